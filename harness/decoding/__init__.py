"""From weights to captions."""

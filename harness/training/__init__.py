"""From loaded weights to the best checkpoint."""

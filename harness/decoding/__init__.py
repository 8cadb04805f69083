"""Decoding: from weights to captions, and post-processing."""

"""Training: from loaded weights to the best checkpoint."""

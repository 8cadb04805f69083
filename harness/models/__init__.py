"""The captioning model, and the small checkpoints that stand in where no weights are at hand."""

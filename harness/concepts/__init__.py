"""Concept detection: labels, predictors without training, thresholds, ensembles and baselines."""

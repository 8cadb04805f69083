"""Optuna studies of experiments (sole optuna import): a trial is a run and shares steps like any other run.

`spec` reads and checks a study file, `storage` opens Optuna's storage, `trials` assigns trials to workers,
`work` runs them, and `results` shows the results.
"""

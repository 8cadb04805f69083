"""Optuna studies of experiments (sole optuna import): a trial is a run, and shares steps as any other run.

`spec` reads and checks a study file, `storage` opens Optuna's, `trials` says who works at which trial,
`work` runs them, and `results` shows what came out.
"""

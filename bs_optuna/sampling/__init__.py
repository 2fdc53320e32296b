"""Optuna samplers that know how learning rate and batch size belong together."""

"""Scaling laws, priors and plans: pure functions on numbers, without Optuna or PyTorch."""

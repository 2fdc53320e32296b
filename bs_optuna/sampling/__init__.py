"""Optuna samplers that know how learning rate and batch size belong together."""

from bs_optuna.sampling.recommend import recommend
from bs_optuna.sampling.recommendation import Recommendation
from bs_optuna.sampling.sampler import CoupledSampler


__all__ = ["CoupledSampler", "Recommendation", "recommend"]

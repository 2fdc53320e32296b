"""Tune batch size and learning rate together, in whatever memory there is.

The names below load Optuna when they are first used, not when this package is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING
from typing import Any


if TYPE_CHECKING:
    from bs_optuna.sampling.recommend import recommend as recommend
    from bs_optuna.sampling.recommendation import Recommendation as Recommendation
    from bs_optuna.sampling.sampler import CoupledSampler as CoupledSampler
    from bs_optuna.science.noise_scale import NoiseScale as NoiseScale
    from bs_optuna.science.prior import ScalingPrior as ScalingPrior
    from bs_optuna.science.scaling import scale_learning_rate as scale_learning_rate
    from bs_optuna.study.opening import open_study as open_study

_MODULES = {
    "CoupledSampler": "sampling.sampler",
    "NoiseScale": "science.noise_scale",
    "Recommendation": "sampling.recommendation",
    "ScalingPrior": "science.prior",
    "open_study": "study.opening",
    "recommend": "sampling.recommend",
    "scale_learning_rate": "science.scaling",
}

__all__ = [
    "CoupledSampler",
    "NoiseScale",
    "Recommendation",
    "ScalingPrior",
    "open_study",
    "recommend",
    "scale_learning_rate",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)

"""What is believed about the best learning rate at every batch size before the first trial.

Symbols: B batch size (samples per optimizer step), lr learning rate, m momentum, (B0, lr0) the
reference; a and Bc exponent and critical batch size of the law in `bs_optuna.science.ridge`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bs_optuna.errors import ConfigError
from bs_optuna.science.evidence import RidgeEvidence
from bs_optuna.science.ridge import TYPICAL_MOMENTUM
from bs_optuna.science.ridge import Anchor
from bs_optuna.science.ridge import ridge


if TYPE_CHECKING:
    from optuna.study import Study

Array = NDArray[np.float64]

LOG_2 = math.log(2.0)
LOG_3 = math.log(3.0)
LOG_10 = math.log(10.0)

# Slope of ln lr* against ln B at the reference, mean and standard deviation. SGD: between the
# square-root and the linear rule (Goyal 2017, Krizhevsky 2014). Adam and its kin: the square root
# of the SDE argument (Malladi 2022), less what is measured in practice (0.16 by Marek 2025, 0.35
# on public language-model grids). Sign-like: the square root, hardly measured. Unknown: anything.
_SLOPES = {
    "sgd": (0.8, 0.25),
    "adam": (0.4, 0.25),
    "sign": (0.45, 0.25),
    "layerwise": (0.5, 0.25),
    "unknown": (0.5, 0.35),
}

# Optimizers whose steps add up to lr/(1 - m), and the momentum that their learning rate below goes
# with. Where momentum is a weighted mean of gradients, as in Adam, or its sign is taken, it leaves
# the scale of lr alone.
_ADDS_UP = {
    "sgd": TYPICAL_MOMENTUM,
    "momentum": TYPICAL_MOMENTUM,
    "lars": TYPICAL_MOMENTUM,  # You et al. 2017
    "rmsprop": 0.0,  # PyTorch's default
}
# Optimizer -> (family, learning rate that its authors or libraries start from). The value is at
# B0 = 256 and is believed only to within a factor of ten.
_OPTIMIZERS: dict[str, tuple[str, float | None]] = {
    "sgd": ("sgd", 0.1),  # He et al. 2016; Goyal et al. 2017
    "momentum": ("sgd", 0.1),
    "adam": ("adam", 1e-3),  # Kingma & Ba 2015; PyTorch's default
    "adamw": ("adam", 1e-3),
    "nadam": ("adam", 1e-3),
    "radam": ("adam", 1e-3),
    "rmsprop": ("adam", 1e-3),
    "adafactor": ("adam", 1e-2),  # PyTorch's default; Shazeer & Stern 2018
    "lion": ("sign", 1e-4),  # Chen et al. 2023
    "signsgd": ("sign", 1e-4),
    "muon": ("sign", 2e-2),  # Jordan et al. 2024
    "lars": ("layerwise", None),  # the trust ratio sets the scale, and its constants vary
    "lamb": ("layerwise", None),
    "unknown": ("unknown", None),
}
_TYPICAL_BATCH_SIZE = 256.0

# At B0 the saturating law has slope a / (1 + B0/Bc): two thirds of a for the median Bc = 2 B0.
_EXPONENT_PER_SLOPE = 1.5
_EXPONENT_BOUNDS = (-0.2, 1.2)
_SDS_IN_90_PERCENT = 2.0 * 1.645


@dataclass(frozen=True, kw_only=True)
class ScalingPrior:
    """Normal beliefs about exponent, critical batch size and learning rate at the reference.

    Attributes:
        exponent: Mean of a, the slope of ln lr* against ln B far below the critical batch size.
        exponent_sd: Its standard deviation.
        critical_batch_size: Median of Bc in samples; None means twice the reference batch size.
        critical_batch_size_log_sd: Standard deviation of ln Bc.
        reference_batch_size: B0 in samples; None means the middle of the searched range.
        learning_rate: Median of lr0, the best learning rate at B0; None means that only the
            searched range tells.
        learning_rate_log_sd: Standard deviation of ln lr0.
        momentum_exponent: Power of 1 - m that the best learning rate is proportional to, where the
            momentum m is tuned: 1 for SGD, RMSprop and LARS, which add gradients up, 0 for
            optimizers that average them, as Adam does.
        reference_momentum: The momentum that lr0 goes with.
    """

    exponent: float
    exponent_sd: float
    critical_batch_size: float | None = None
    critical_batch_size_log_sd: float = 2.0
    reference_batch_size: float | None = None
    learning_rate: float | None = None
    learning_rate_log_sd: float = LOG_10
    momentum_exponent: float = 0.0
    reference_momentum: float = TYPICAL_MOMENTUM

    def __post_init__(self) -> None:
        low, high = _EXPONENT_BOUNDS
        if not low <= self.exponent <= high:
            raise ConfigError(f"exponent is {self.exponent}; choose one within [{low}, {high}].")
        for name in ("exponent_sd", "critical_batch_size_log_sd", "learning_rate_log_sd"):
            _require_positive(name, getattr(self, name))
        for name in ("critical_batch_size", "reference_batch_size", "learning_rate"):
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))
        if not 0.0 <= self.reference_momentum < 1.0:
            raise ConfigError(
                f"reference_momentum is {self.reference_momentum}; choose one from 0 to below 1."
            )

    @classmethod
    def for_optimizer(cls, optimizer: str) -> ScalingPrior:
        """The default belief for an optimizer, by its usual name in lower or upper case.

        Raises:
            ConfigError: The optimizer is not among the known ones.
        """
        name = str(optimizer).lower()  # None and classes are unknown, too
        try:
            family, learning_rate = _OPTIMIZERS[name]
        except KeyError:
            known = ", ".join(sorted(_OPTIMIZERS))
            raise ConfigError(
                f"No scaling prior for optimizer {optimizer!r}; choose one of {known}."
            ) from None
        slope, sd = _SLOPES[family]
        return cls(
            exponent=min(_EXPONENT_PER_SLOPE * slope, 1.0),
            exponent_sd=sd,
            reference_batch_size=None if learning_rate is None else _TYPICAL_BATCH_SIZE,
            learning_rate=learning_rate,
            momentum_exponent=1.0 if name in _ADDS_UP else 0.0,
            reference_momentum=_ADDS_UP.get(name, TYPICAL_MOMENTUM),
        )

    @classmethod
    def from_study(cls, study: Study, *, prior: str | ScalingPrior | None = None) -> ScalingPrior:
        """What another study has learned, as a new one's belief.

        A study whose parameters have names that its sampler does not know:
        `from_evidence(recommend(study, batch_size_name=..., ...))`, with all of them.

        Args:
            study: Any Optuna study that `recommend` has an answer for.
            prior: Its optimizer or belief; None takes that which it was sampled with, as far as
                `recommend` knows it.

        Raises:
            StudyError: As for `recommend`.
        """
        # The one arrow that points up, when called: what a study says is for `sampling` to know.
        from bs_optuna.sampling.recommend import recommend

        return cls.from_evidence(recommend(study, prior=prior))

    @classmethod
    def from_evidence(cls, evidence: RidgeEvidence) -> ScalingPrior:
        """What is known about a ridge, such as `recommend(old_study)`, as a new study's belief.

        Its intervals are widened by what a new model, data set or budget may change: the best
        learning rate by a factor of two, the slope by 0.1, the critical batch size by e. The
        learning rate goes with the momentum that was found: a new study that does not tune momentum
        has to use that.
        """
        learning_rate_sd = math.hypot(_log_sd(evidence.learning_rate_interval), LOG_2)
        low, high = evidence.exponent_interval
        return cls(
            exponent=min(max(evidence.exponent, _EXPONENT_BOUNDS[0]), _EXPONENT_BOUNDS[1]),
            exponent_sd=math.hypot((high - low) / _SDS_IN_90_PERCENT, 0.1),
            critical_batch_size=evidence.critical_batch_size,
            critical_batch_size_log_sd=math.hypot(
                _log_sd(evidence.critical_batch_size_interval), 1.0
            ),
            reference_batch_size=evidence.batch_size,
            learning_rate=evidence.learning_rate,
            learning_rate_log_sd=learning_rate_sd,
            momentum_exponent=evidence.momentum_exponent,
            reference_momentum=(
                TYPICAL_MOMENTUM if evidence.momentum is None else evidence.momentum
            ),
        )

    def with_reference(self, batch_size: float, learning_rate: float) -> ScalingPrior:
        """The same belief, anchored at a setting known to within a factor of three.

        Raises:
            ConfigError: One of the two is not positive.
        """
        return replace(
            self,
            reference_batch_size=batch_size,
            learning_rate=learning_rate,
            learning_rate_log_sd=LOG_3,
        )

    def with_noise_scale(self, noise_scale: float) -> ScalingPrior:
        """The same belief after a measured gradient noise scale, a guide to Bc within 3x.

        Raises:
            ConfigError: The noise scale is not positive.
        """
        _require_positive("noise_scale", noise_scale)
        mean, before, after = math.log(noise_scale), 0.0, LOG_3**-2
        if self.critical_batch_size is not None:
            before = self.critical_batch_size_log_sd**-2
            mean = (before * math.log(self.critical_batch_size) + after * mean) / (before + after)
        return replace(
            self,
            critical_batch_size=math.exp(mean),
            critical_batch_size_log_sd=(before + after) ** -0.5,
        )

    def anchored_in(
        self,
        batch_sizes: tuple[float, float],
        learning_rates: tuple[float, float],
        one_minus_momenta: tuple[float, float] | None = None,
    ) -> Anchor:
        """The belief inside the searched ranges of B, lr and 1 - m, with every None filled in.

        A range is a belief too: its ends are where its author would have been surprised, so it
        counts as a normal whose two standard deviations reach them. It is multiplied with the
        belief about lr0, carried along the mean ridge to the geometric middle of the batch sizes.
        A reference from experience (within a factor of three) stays where it is. Where the momentum
        is tuned too, ranges that are independent hold pairs that nobody believes in, so they only
        bound the published learning rate.
        """
        middle = 0.5 * math.log(batch_sizes[0] * batch_sizes[1])
        origin = middle
        if self.reference_batch_size is not None:
            origin = math.log(self.reference_batch_size)
        trusted = self.learning_rate is not None and self.learning_rate_log_sd <= LOG_3
        here = origin if trusted else middle
        critical = here + LOG_2
        if self.critical_batch_size is not None:
            critical = math.log(self.critical_batch_size)
        if trusted and self.learning_rate is not None:
            mean, sd = math.log(self.learning_rate), self.learning_rate_log_sd
        else:
            carried = None
            if self.learning_rate is not None:
                step = ridge(np.array([origin, middle]), self.exponent, critical)
                carried = math.log(self.learning_rate) + float(step[1] - step[0])
            mean, sd = self._believed(carried, learning_rates, one_minus_momenta)
        return Anchor(
            exponent=self.exponent,
            exponent_sd=self.exponent_sd,
            log_critical=critical,
            log_critical_sd=self.critical_batch_size_log_sd,
            log_batch_size=here,
            log_learning_rate=mean,
            log_learning_rate_sd=sd,
            momentum_exponent=self.momentum_exponent,
            log_one_minus_momentum=math.log1p(-self.reference_momentum),
        )

    def _believed(
        self,
        carried: float | None,
        learning_rates: tuple[float, float],
        one_minus_momenta: tuple[float, float] | None,
    ) -> tuple[float, float]:
        """Mean and deviation of ln lr* at the middle batch size: what is published, and ranges."""
        low, high = (math.log(lr) for lr in learning_rates)
        mean, sd = 0.5 * (low + high), max(high - low, 1e-9) / 4.0
        if carried is None:
            return mean, sd
        published_sd = self.learning_rate_log_sd
        if one_minus_momenta is not None and self.momentum_exponent != 0.0:
            reference = math.log1p(-self.reference_momentum)
            shifts = [self.momentum_exponent * (math.log(m) - reference) for m in one_minus_momenta]
            return min(max(carried, low - max(shifts)), high - min(shifts)), published_sd
        of_range, of_published = sd**-2, published_sd**-2
        together = of_range + of_published
        return (of_range * mean + of_published * carried) / together, together**-0.5


def _log_sd(interval: tuple[float, float]) -> float:
    """Standard deviation of the logarithm of what lies in a 90 % interval."""
    return math.log(interval[1] / interval[0]) / _SDS_IN_90_PERCENT


def _require_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} is {value}; it must be positive and finite.")

"""How noisy the gradient is, and what that says about the batch size.

Symbols: g_j mean gradient of microbatch j, b_j its size in samples (tokens, if the loss weighs
those), n microbatches, B = sum b_j, g = sum (b_j/B) g_j the gradient of the batch; G the true
gradient, Sigma the covariance of one sample's gradient; B_simple = tr(Sigma)/|G|**2 in samples.

B_simple (McCandlish et al. 2018, arXiv 1812.06162) tells the critical batch size to within a factor
of about three: it leaves out the curvature. It is small at the beginning and grows during training.
It is wrong where samples of a microbatch share something, as in batch normalization.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from bs_optuna.errors import ConfigError
from bs_optuna.science.scaling import check_positive


@dataclass(frozen=True)
class NoiseReading:
    """What the microbatches of one step say; unbiased, and very noisy taken alone.

    Attributes:
        squared_gradient: Estimate of |G|**2; negative in a good share of readings.
        variance: Estimate of tr(Sigma), per sample.
    """

    squared_gradient: float
    variance: float

    @property
    def noise_scale(self) -> float | None:
        """B_simple in samples; None where signal cannot be told from noise."""
        if self.squared_gradient <= 0.0 or self.variance < 0.0:
            return None
        return self.variance / self.squared_gradient


def read_noise(
    *, sizes: Sequence[float], squared_norms: Sequence[float], batch_squared_norm: float
) -> NoiseReading:
    """Estimates signal and noise from the microbatch gradients of one step.

    With q = sum p_j |g_j|**2, Q = |g|**2 and p_j = b_j/B, for any sizes:
    |G|**2 = (n*Q - q)/(n - 1) and tr(Sigma) = B*(q - Q)/(n - 1). For equal sizes these are the
    estimators of McCandlish et al. 2018, arXiv 1812.06162, appendix A.1.

    Args:
        sizes: b_j, samples (or tokens) in each microbatch; at least two.
        squared_norms: |g_j|**2 of the mean gradient of each microbatch, before clipping and
            without the scale of a `GradScaler`.
        batch_squared_norm: |g|**2 of the mean gradient of the whole batch.

    Returns:
        The reading; average readings before dividing, see `NoiseScale`.

    Raises:
        ConfigError: There are fewer than two microbatches, not as many norms, or a size is not
            positive and finite.
    """
    n = len(sizes)
    if n < 2:
        raise ConfigError(
            f"{n} microbatch says nothing about noise; at least 2 are needed, accumulate more"
        )
    if len(squared_norms) != n:
        raise ConfigError(f"{len(squared_norms)} squared norms for {n} microbatches; give one each")
    for size in sizes:
        check_positive("size of a microbatch", size)
    batch_size = math.fsum(sizes)
    mean = math.fsum(b * norm for b, norm in zip(sizes, squared_norms, strict=True)) / batch_size
    return NoiseReading(
        squared_gradient=(n * batch_squared_norm - mean) / (n - 1),
        variance=batch_size * (mean - batch_squared_norm) / (n - 1),
    )


@final
class NoiseScale:
    """The noise scale over many steps: averages signal and noise apart, then divides.

    Averaging the ratios instead is wrong: the estimate of |G|**2 is often near zero or below.

    Args:
        decay: Share of the old average that a new reading leaves, in [0, 1); 0.95 to 0.99.

    Raises:
        ConfigError: The decay is not in [0, 1).
    """

    def __init__(self, *, decay: float = 0.95) -> None:
        if not 0.0 <= decay < 1.0:
            raise ConfigError(f"decay is {decay!r}; it must be at least 0 and below 1, e.g. 0.95")
        self._decay = decay
        self._weight = 0.0
        self._squared_gradient = 0.0
        self._variance = 0.0

    def add(self, reading: NoiseReading) -> None:
        """Takes in a reading; leaves out one that is not finite (half precision overflows)."""
        if not (math.isfinite(reading.squared_gradient) and math.isfinite(reading.variance)):
            return
        new = 1.0 - self._decay
        self._weight += new * (1.0 - self._weight)
        self._squared_gradient += new * (reading.squared_gradient - self._squared_gradient)
        self._variance += new * (reading.variance - self._variance)

    @property
    def averages(self) -> NoiseReading | None:
        """The averaged signal and noise, free of the zero they started from; None at first."""
        if self._weight == 0.0:
            return None
        return NoiseReading(self._squared_gradient / self._weight, self._variance / self._weight)

    @property
    def value(self) -> float | None:
        """B_simple in samples; None as long as the readings do not tell signal from noise."""
        averages = self.averages
        return None if averages is None else averages.noise_scale


def pooled(readings: Sequence[NoiseReading]) -> NoiseReading:
    """Several readings of equal weight as one: means of signal and noise, to be divided after that.

    Raises:
        ConfigError: There is none.
    """
    if not readings:
        raise ConfigError("0 readings have no mean; read at least 1")
    return NoiseReading(
        squared_gradient=math.fsum(r.squared_gradient for r in readings) / len(readings),
        variance=math.fsum(r.variance for r in readings) / len(readings),
    )


def adascale_gain(noise_scale: float, *, from_batch_size: float, to_batch_size: float) -> float:
    """How many steps at one batch size a step at another is worth: AdaScale's r.

    r = (s + m) / (s/k + m), s the gradient's variance at the first size, m its squared mean, k the
    growth; 1 <= r <= k for k >= 1 (Johnson et al. 2020, arXiv 2007.05105). With s/m = noise_scale /
    from_batch_size that is the saturating rule (1 + Bc/from)/(1 + Bc/to). Multiply SGD's learning
    rate by it and move the schedule on by r steps; for Adam, Pollux takes sqrt(r).

    Args:
        noise_scale: B_simple in samples, 0 or more.
        from_batch_size: Samples per step that the learning rate was tuned for.
        to_batch_size: Samples per step that are taken.

    Returns:
        The gain r.

    Raises:
        ConfigError: A number is out of bounds.
    """
    _check_sizes(noise_scale, from_batch_size, to_batch_size)
    return (1.0 + noise_scale / from_batch_size) / (1.0 + noise_scale / to_batch_size)


def statistical_efficiency(
    noise_scale: float, *, from_batch_size: float, to_batch_size: float
) -> float:
    """What a sample is worth at one batch size, compared with another.

    (B_simple + from) / (B_simple + to) (Pollux: Qiao et al. 2021, arXiv 2008.12260). Throughput in
    samples per second times this is the goodput; the batch size with the most is the fastest.

    Args:
        noise_scale: B_simple in samples, 0 or more.
        from_batch_size: Samples per step that count as 1.
        to_batch_size: Samples per step to be judged.

    Returns:
        Progress per sample at `to_batch_size` over that at `from_batch_size`.

    Raises:
        ConfigError: A number is out of bounds.
    """
    _check_sizes(noise_scale, from_batch_size, to_batch_size)
    return (noise_scale + from_batch_size) / (noise_scale + to_batch_size)


def _check_sizes(noise_scale: float, from_batch_size: float, to_batch_size: float) -> None:
    if not 0.0 <= noise_scale < math.inf:
        raise ConfigError(f"noise_scale is {noise_scale!r}; it must be 0 or more and finite")
    check_positive("from_batch_size", from_batch_size)
    check_positive("to_batch_size", to_batch_size)

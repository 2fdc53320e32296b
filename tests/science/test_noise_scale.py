"""The estimators of signal and noise are unbiased, checked against every sample's gradient."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bs_optuna.errors import ConfigError
from bs_optuna.science.noise_scale import NoiseReading
from bs_optuna.science.noise_scale import NoiseScale
from bs_optuna.science.noise_scale import adascale_gain
from bs_optuna.science.noise_scale import read_noise
from bs_optuna.science.noise_scale import statistical_efficiency
from bs_optuna.science.scaling import SaturatingRule


Array = NDArray[np.float64]

BATCH_SIZES = st.integers(1, 10**6)
NOISE_SCALES = st.floats(0.0, 1e6)


def per_sample_gradients(samples: int, seed: int) -> Array:
    """Gradients of a linear regression in float64, one row per sample."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(samples, 5))
    residuals = inputs @ rng.normal(size=5) - rng.normal(size=samples)
    return np.asarray(2.0 * residuals[:, None] * inputs)


def reading_of(gradients: Array, sizes: list[int]) -> NoiseReading:
    """What a step over these samples, cut into these sizes, would measure."""
    parts = np.split(gradients, np.cumsum(sizes)[:-1])
    return read_noise(
        sizes=sizes,
        squared_norms=[float(np.sum(part.mean(axis=0) ** 2)) for part in parts],
        batch_squared_norm=float(np.sum(gradients.mean(axis=0) ** 2)),
    )


@pytest.mark.parametrize("sizes", [[1, 1], [2, 1], [1, 1, 1], [3, 1]])
def test_the_mean_over_every_possible_batch_is_exact(sizes: list[int]) -> None:
    """All draws with replacement of a small data set: no bias at all, ragged or not."""
    data = per_sample_gradients(5, seed=1)
    signal = float(np.sum(data.mean(axis=0) ** 2))
    noise = float(np.sum(data.var(axis=0)))

    draws = itertools.product(range(len(data)), repeat=sum(sizes))
    readings = [reading_of(data[list(draw)], sizes) for draw in draws]

    mean_signal = np.mean([reading.squared_gradient for reading in readings])
    mean_noise = np.mean([reading.variance for reading in readings])
    assert mean_signal == pytest.approx(signal, rel=1e-10)
    assert mean_noise == pytest.approx(noise, rel=1e-10)


@given(st.lists(st.integers(1, 5), min_size=2, max_size=8), st.integers(0, 1000))
@settings(max_examples=50)
def test_signal_and_noise_add_up_to_what_was_measured(sizes: list[int], seed: int) -> None:
    # E|g|^2 = |G|^2 + tr(Sigma)/B holds for the estimates of every single step.
    gradients = per_sample_gradients(sum(sizes), seed)
    reading = reading_of(gradients, sizes)

    total = reading.squared_gradient + reading.variance / sum(sizes)
    assert total == pytest.approx(float(np.sum(gradients.mean(axis=0) ** 2)), rel=1e-9)


def test_single_samples_give_the_sample_variance() -> None:
    gradients = per_sample_gradients(64, seed=3)

    reading = reading_of(gradients, [1] * 64)

    assert reading.variance == pytest.approx(float(np.sum(gradients.var(axis=0, ddof=1))), rel=1e-9)


def test_without_noise_the_signal_is_exact() -> None:
    reading = reading_of(np.ones((8, 3)), [4, 3, 1])

    assert reading.squared_gradient == pytest.approx(3.0)
    assert reading.variance == pytest.approx(0.0, abs=1e-12)


def test_the_ratio_of_averages_finds_the_truth_where_the_average_of_ratios_does_not() -> None:
    rng = np.random.default_rng(0)
    data = per_sample_gradients(4000, seed=5)
    truth = float(np.sum(data.var(axis=0)) / np.sum(data.mean(axis=0) ** 2))
    scale = NoiseScale(decay=0.999)
    ratios = []
    for _ in range(5000):
        reading = reading_of(data[rng.integers(0, len(data), size=16)], [4] * 4)
        ratios.append(reading.variance / reading.squared_gradient)
        scale.add(reading)

    assert scale.value == pytest.approx(truth, rel=0.1)
    assert abs(np.mean(ratios) / truth - 1.0) > 0.2


@given(st.floats(0.0, 0.99), st.floats(0.1, 10.0), st.floats(0.1, 10.0), st.integers(1, 20))
def test_equal_readings_are_their_own_average_from_the_first_on(
    decay: float, signal: float, noise: float, times: int
) -> None:
    scale = NoiseScale(decay=decay)
    for _ in range(times):
        scale.add(NoiseReading(squared_gradient=signal, variance=noise))

    assert scale.value == pytest.approx(noise / signal, rel=1e-9)


def test_not_yet_is_said_until_signal_stands_out() -> None:
    scale = NoiseScale(decay=0.5)
    assert scale.value is None
    assert scale.averages is None

    scale.add(NoiseReading(squared_gradient=-1.0, variance=3.0))
    assert scale.value is None
    scale.add(NoiseReading(squared_gradient=math.inf, variance=math.nan))  # an overflow
    assert scale.averages == NoiseReading(-1.0, 3.0)
    scale.add(NoiseReading(squared_gradient=2.0, variance=3.0))

    assert scale.value == pytest.approx(3.0)  # averages: signal 1, noise 3


@given(NOISE_SCALES, BATCH_SIZES, BATCH_SIZES)
def test_adascale_gains_at_most_the_growth(noise: float, first: int, second: int) -> None:
    small, large = sorted((first, second))
    gain = adascale_gain(noise, from_batch_size=small, to_batch_size=large)

    assert 1.0 - 1e-12 <= gain <= large / small * (1.0 + 1e-12)


@given(st.floats(1e-3, 1e6), BATCH_SIZES, BATCH_SIZES)
def test_adascale_is_the_saturating_rule(noise: float, first: int, second: int) -> None:
    gain = adascale_gain(noise, from_batch_size=first, to_batch_size=second)

    assert gain == pytest.approx(SaturatingRule(noise).ratio(first, second), rel=1e-12)


@given(NOISE_SCALES, BATCH_SIZES, BATCH_SIZES)
def test_efficiency_times_growth_is_the_gain(noise: float, first: int, second: int) -> None:
    assume(first != second)
    gain = adascale_gain(noise, from_batch_size=first, to_batch_size=second)
    efficiency = statistical_efficiency(noise, from_batch_size=first, to_batch_size=second)

    assert efficiency * second / first == pytest.approx(gain, rel=1e-9)


def test_too_few_microbatches_or_norms_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 microbatch says nothing about noise; at least 2"):
        read_noise(sizes=[4], squared_norms=[1.0], batch_squared_norm=1.0)
    with pytest.raises(ConfigError, match="1 squared norms for 2 microbatches; give one each"):
        read_noise(sizes=[4, 4], squared_norms=[1.0], batch_squared_norm=1.0)
    with pytest.raises(ConfigError, match="size of a microbatch is 0; "):
        read_noise(sizes=[4, 0], squared_norms=[1.0, 1.0], batch_squared_norm=1.0)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_numbers_out_of_bounds_are_refused(bad: float) -> None:
    with pytest.raises(ConfigError, match=f"noise_scale is {bad}; it must be 0 or more"):
        adascale_gain(bad, from_batch_size=1, to_batch_size=2)
    with pytest.raises(ConfigError, match=f"to_batch_size is {bad}; "):
        statistical_efficiency(1.0, from_batch_size=1, to_batch_size=bad)
    with pytest.raises(ConfigError, match=f"decay is {bad}; it must be at least 0 and below 1"):
        NoiseScale(decay=bad)

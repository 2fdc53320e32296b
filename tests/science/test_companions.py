"""What is scaled with the batch size keeps what it is meant to keep."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_optuna.errors import ConfigError
from bs_optuna.science.companions import scale_beta
from bs_optuna.science.companions import scale_ema_decay
from bs_optuna.science.companions import scale_eps
from bs_optuna.science.companions import scale_warmup_epochs
from bs_optuna.science.companions import scale_weight_decay
from bs_optuna.science.companions import warmup_steps
from bs_optuna.science.scaling import PowerRule
from bs_optuna.science.scaling import SaturatingRule
from bs_optuna.science.scaling import ScalingRule


BETAS = st.floats(0.5, 0.9999)
FACTORS = st.floats(1e-2, 1e2)
BATCH_SIZES = st.integers(1, 10**6)
RULES = st.one_of(
    st.builds(PowerRule, st.floats(0.0, 1.0)),
    st.builds(SaturatingRule, st.floats(1.0, 1e5), st.floats(0.25, 1.0)),
)


def close(value: float) -> object:
    return pytest.approx(value, rel=1e-9)


@given(BETAS, FACTORS)
def test_an_average_keeps_its_half_life_in_samples(beta: float, k: float) -> None:
    # Steps until a weight has halved, times samples per step, must not change.
    half_life = math.log(0.5) / math.log(beta)
    scaled = scale_beta(beta, k)

    if scaled > 0.01:
        assert math.log(0.5) / math.log(scaled) * k == pytest.approx(half_life, rel=1e-6)
    assert scale_ema_decay(beta, k) == scaled


@given(BETAS, FACTORS, FACTORS)
def test_two_growths_of_a_beta_are_one(beta: float, first: float, second: float) -> None:
    twice = scale_beta(scale_beta(beta, first), second)

    assert twice == pytest.approx(scale_beta(beta, first * second), rel=1e-6, abs=1e-12)


@given(st.floats(0.9, 0.99999), st.floats(2.0, 100.0))
def test_the_power_of_beta_is_malladis_rule_to_first_order(beta: float, k: float) -> None:
    first_order = 1.0 - k * (1.0 - beta)
    second_order = 0.5 * k * (k - 1.0) * (1.0 - beta) ** 2

    difference = scale_beta(beta, k) - first_order
    assert -1e-12 <= difference <= second_order + 1e-12


def test_the_power_of_beta_stays_below_one_where_malladis_rule_fails() -> None:
    assert 1.0 - 64 * (1.0 - 0.95) < 0.0
    assert 0.0 < scale_beta(0.95, 64) < 1.0


@given(st.floats(1e-12, 1e-2), FACTORS)
def test_eps_keeps_its_share_of_the_noise(eps: float, k: float) -> None:
    # Where noise dominates, the root of the second moment is sigma / sqrt(B).
    rng = np.random.default_rng(0)
    noise = rng.normal(size=1000)
    before, after = np.sqrt(np.mean(noise**2)), np.sqrt(np.mean((noise / math.sqrt(k)) ** 2))

    assert scale_eps(eps, k) / after == close(eps / before)


@given(RULES, BATCH_SIZES, BATCH_SIZES, st.floats(1e-5, 1.0))
def test_adamw_remembers_as_many_epochs(
    rule: ScalingRule, first: int, second: int, decay: float
) -> None:
    scaled = scale_weight_decay(decay, from_batch_size=first, to_batch_size=second, rule=rule)

    # tau = B / (lr * weight_decay * N), here with lr = 1 at `first` and N = 1
    assert second / (rule.ratio(first, second) * scaled) == close(first / decay)


@pytest.mark.parametrize(("rule", "factor"), [("linear", 1.0), ("sqrt", 2.0), ("constant", 4.0)])
def test_weight_decay_depends_on_the_rule_of_the_learning_rate(rule: str, factor: float) -> None:
    scaled = scale_weight_decay(0.01, from_batch_size=64, to_batch_size=256, rule=rule)

    assert scaled == close(0.01 * factor)


@pytest.mark.parametrize(
    ("total", "beta2", "expected"),
    [
        (10_000, None, 500),
        (100_000, 0.999, 5_000),
        (30_000, 0.999, 2_000),  # 2 / (1 - beta2) is more than 5 %
        (10_000, 0.999, 1_000),  # but never more than 10 %
        (10_000, 0.95, 500),
        (9, 0.999, 0),
    ],
)
def test_warmup_steps(total: int, beta2: float | None, expected: int) -> None:
    assert warmup_steps(total, beta2=beta2) == expected


@given(st.integers(1, 10**7), st.one_of(st.none(), st.floats(0.0, 0.99999)))
def test_warmup_is_at_most_a_tenth(total: int, beta2: float | None) -> None:
    assert 0 <= warmup_steps(total, beta2=beta2) <= 0.1 * total


@given(st.floats(0.0, 100.0), FACTORS, st.integers(1000, 10**6))
def test_legw_keeps_the_warmup_in_steps(epochs: float, k: float, steps_per_epoch: int) -> None:
    scaled = scale_warmup_epochs(epochs, k)

    assert scaled * (steps_per_epoch / k) == close(epochs * steps_per_epoch)


@pytest.mark.parametrize("bad", [1.0, 1.5, -0.1, math.nan])
def test_decays_out_of_bounds_are_refused(bad: float) -> None:
    with pytest.raises(ConfigError, match=f"beta is {bad}; it must be at least 0 and below 1"):
        scale_beta(bad, 2)
    with pytest.raises(ConfigError, match=f"decay is {bad}; "):
        scale_ema_decay(bad, 2)
    with pytest.raises(ConfigError, match=f"beta2 is {bad}; "):
        warmup_steps(1000, beta2=bad)


@pytest.mark.parametrize("bad", [0.0, -2.0, math.nan, math.inf])
def test_growths_out_of_bounds_are_refused(bad: float) -> None:
    for scale in (scale_beta, scale_ema_decay, scale_eps, scale_warmup_epochs):
        with pytest.raises(ConfigError, match=f"k is {bad}; it must be positive and finite"):
            scale(0.5, bad)
    with pytest.raises(ConfigError, match="total_steps is 0; "):
        warmup_steps(0)


@pytest.mark.parametrize("bad", [-1e-8, math.nan, math.inf])
def test_amounts_out_of_bounds_are_refused(bad: float) -> None:
    with pytest.raises(ConfigError, match=f"eps is {bad}; it must be 0 or more"):
        scale_eps(bad, 2)
    with pytest.raises(ConfigError, match=f"weight_decay is {bad}; it must be 0 or more"):
        scale_weight_decay(bad, from_batch_size=1, to_batch_size=2, rule="sqrt")
    with pytest.raises(ConfigError, match=f"warmup_epochs is {bad}; it must be 0 or more"):
        scale_warmup_epochs(bad, 2)

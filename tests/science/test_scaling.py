"""The scaling rules obey their laws, for every batch size and learning rate."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_optuna.errors import ConfigError
from bs_optuna.science.scaling import CONSTANT
from bs_optuna.science.scaling import LINEAR
from bs_optuna.science.scaling import SQRT
from bs_optuna.science.scaling import PowerRule
from bs_optuna.science.scaling import SaturatingRule
from bs_optuna.science.scaling import ScalingRule
from bs_optuna.science.scaling import parse_scaling_rule
from bs_optuna.science.scaling import scale_learning_rate


BATCH_SIZES = st.integers(1, 10**6)
FACTORS = st.floats(1e-4, 1e4)
RATES = st.floats(1e-7, 10.0)
POWERS = st.builds(PowerRule, st.floats(0.0, 1.0))
SATURATING = st.builds(SaturatingRule, st.floats(1.0, 1e5), st.floats(0.25, 1.0))
RULES = st.one_of(POWERS, SATURATING)


def close(value: float) -> object:
    return pytest.approx(value, rel=1e-9)


@given(RULES, RATES, BATCH_SIZES, BATCH_SIZES)
def test_going_there_and_back_changes_nothing(
    rule: ScalingRule, rate: float, first: int, second: int
) -> None:
    there = scale_learning_rate(rate, from_batch_size=first, to_batch_size=second, rule=rule)
    back = scale_learning_rate(there, from_batch_size=second, to_batch_size=first, rule=rule)

    assert back == close(rate)


@given(RULES, BATCH_SIZES, BATCH_SIZES, BATCH_SIZES)
def test_a_detour_changes_nothing(rule: ScalingRule, first: int, second: int, third: int) -> None:
    detour = rule.ratio(first, second) * rule.ratio(second, third)

    assert detour == close(rule.ratio(first, third))


@given(RULES, BATCH_SIZES)
def test_the_same_batch_size_keeps_the_learning_rate(rule: ScalingRule, batch_size: int) -> None:
    assert rule.ratio(batch_size, batch_size) == 1.0


@given(RULES, BATCH_SIZES, BATCH_SIZES)
def test_a_larger_batch_never_lowers_the_learning_rate(
    rule: ScalingRule, first: int, second: int
) -> None:
    small, large = sorted((first, second))

    assert rule.ratio(small, large) >= 1.0


@given(POWERS, FACTORS, FACTORS)
def test_a_power_of_a_product_is_the_product_of_powers(
    rule: PowerRule, first: float, second: float
) -> None:
    assert rule.factor(first * second) == close(rule.factor(first) * rule.factor(second))


@given(POWERS, BATCH_SIZES, FACTORS)
def test_a_power_does_not_care_where_it_starts(rule: PowerRule, start: int, k: float) -> None:
    assert rule.ratio(start, start * k) == close(rule.factor(k))


@given(SATURATING, st.floats(1.0, 10.0))
def test_far_below_the_critical_batch_size_saturating_is_a_power(
    rule: SaturatingRule, k: float
) -> None:
    small = rule.critical_batch_size * 1e-6

    expected = PowerRule(rule.exponent).factor(k)
    assert rule.ratio(small, small * k) == pytest.approx(expected, rel=1e-4)


@given(SATURATING, st.floats(1.0, 10.0))
def test_far_above_the_critical_batch_size_saturating_is_constant(
    rule: SaturatingRule, k: float
) -> None:
    large = rule.critical_batch_size * 1e6

    assert rule.ratio(large, large * k) == pytest.approx(CONSTANT.factor(k), rel=1e-4)


def test_at_the_critical_batch_size_half_of_the_maximum_is_reached() -> None:
    assert SaturatingRule(512).ratio(512, 1e15) == close(2.0)
    assert SaturatingRule(512, exponent=0.5).ratio(512, 1e15) == close(math.sqrt(2.0))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", 0.4),  # 64 -> 256 at 0.1, as in Goyal et al.: four times the batch and the rate
        ("sqrt", 0.2),
        ("constant", 0.1),
        ("power:0.4", 0.1 * 4**0.4),
        ("saturating:64", 0.1 * 2 / 1.25),
        ("saturating:64:0.5", 0.1 * (2 / 1.25) ** 0.5),
    ],
)
def test_rules_by_name(name: str, expected: float) -> None:
    scaled = scale_learning_rate(0.1, from_batch_size=64, to_batch_size=256, rule=name)

    assert scaled == close(expected)


def test_names_and_constants_are_the_same_rules() -> None:
    rules = [parse_scaling_rule(name) for name in ("linear", "sqrt", "constant")]

    assert rules == [LINEAR, SQRT, CONSTANT]


@pytest.mark.parametrize(
    "name", ["", "quadratic", "Linear", "power", "power:x", "power:1:2", "saturating", "sqrt:2"]
)
def test_an_unknown_rule_names_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=r"linear, sqrt, constant, power:.*saturating:") as caught:
        parse_scaling_rule(name)

    assert repr(name) in str(caught.value)


NO_SIZES = [0, -1, math.nan, math.inf]


@pytest.mark.parametrize("bad", NO_SIZES)
@pytest.mark.parametrize("rule", [LINEAR, SaturatingRule(100)])
def test_numbers_that_are_no_sizes_are_refused(rule: ScalingRule, bad: float) -> None:
    with pytest.raises(ConfigError, match=f"from_batch_size is {bad}; .*positive and finite"):
        rule.ratio(bad, 1)
    with pytest.raises(ConfigError, match=f"to_batch_size is {bad}; .*positive and finite"):
        rule.ratio(1, bad)
    with pytest.raises(ConfigError, match=f"learning_rate is {bad}; "):
        scale_learning_rate(bad, from_batch_size=1, to_batch_size=1, rule=rule)


@pytest.mark.parametrize("bad", NO_SIZES)
def test_rules_refuse_impossible_numbers(bad: float) -> None:
    with pytest.raises(ConfigError, match=f"k is {bad}; "):
        LINEAR.factor(bad)
    with pytest.raises(ConfigError, match=f"critical_batch_size is {bad}; "):
        SaturatingRule(bad)


@pytest.mark.parametrize("bad", [2.5, -3.0, math.nan, math.inf])
def test_exponents_out_of_bounds_are_refused(bad: float) -> None:
    with pytest.raises(ConfigError, match=rf"exponent {bad} of a power rule is outside \[-2, 2\]"):
        PowerRule(bad)
    with pytest.raises(ConfigError, match=rf"exponent {bad} of a saturating rule is outside \(0"):
        SaturatingRule(1.0, exponent=bad)

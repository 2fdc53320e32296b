"""The ridge's laws, and how beliefs are anchored in a searched range."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bs_optuna.errors import ConfigError
from bs_optuna.science.prior import ScalingPrior
from bs_optuna.science.ridge import ridge


exponents = st.floats(0.05, 1.2)
logs = st.floats(0.0, 12.0)


@given(exponents, logs)
def test_ridge_is_a_power_law_far_below_the_critical_batch_size(a: float, critical: float) -> None:
    below = np.array([critical - 20.0, critical - 19.0])
    low, high = ridge(below, a, critical)
    assert high - low == pytest.approx(a, abs=1e-6)


@given(exponents, logs)
def test_ridge_is_flat_far_above_the_critical_batch_size(a: float, critical: float) -> None:
    low, high = ridge(np.array([critical + 20.0, critical + 21.0]), a, critical)
    assert high - low == pytest.approx(0.0, abs=1e-6)


@given(exponents, logs, logs, logs)
def test_ridge_rises_with_the_batch_size(a: float, critical: float, b: float, c: float) -> None:
    low, high = ridge(np.sort(np.array([b, c])), a, critical)
    assert high >= low


@pytest.mark.parametrize("optimizer", ["sgd", "AdamW", "lamb", "lion", "unknown"])
def test_every_family_anchors_within_its_range(optimizer: str) -> None:
    anchor = ScalingPrior.for_optimizer(optimizer).anchored_in((16, 1024), (1e-4, 1e-1))
    assert anchor.log_batch_size == pytest.approx(math.log(128))
    assert math.log(1e-4) < anchor.log_learning_rate < math.log(1e-1)
    assert anchor.log_critical == pytest.approx(math.log(256))


def test_a_range_pulls_a_typical_learning_rate_and_a_wide_one_pulls_less() -> None:
    prior = ScalingPrior.for_optimizer("adamw")
    narrow = prior.anchored_in((16, 4096), (1e-2, 1.0))
    wide = prior.anchored_in((16, 4096), (1e-4, 100.0))
    typical = math.log(1e-3)
    assert typical < wide.log_learning_rate < narrow.log_learning_rate < math.log(0.1)
    assert narrow.log_learning_rate_sd < wide.log_learning_rate_sd


def test_a_reference_stays_where_it_is() -> None:
    prior = ScalingPrior.for_optimizer("adamw").with_reference(32, 7e-4)
    anchor = prior.anchored_in((16, 1024), (1e-5, 1e-1))
    assert anchor.log_batch_size == pytest.approx(math.log(32))
    assert anchor.log_learning_rate == pytest.approx(math.log(7e-4))
    assert anchor.log_learning_rate_sd == pytest.approx(math.log(3))


@given(st.floats(-9.0, 9.0))
def test_units_of_the_learning_rate_do_not_matter(shift: float) -> None:
    """Of an unknown optimizer nothing but the range tells, so the anchor moves along with it."""
    prior = ScalingPrior.for_optimizer("unknown")
    here = prior.anchored_in((16, 1024), (1e-4, 1e-1))
    there = prior.anchored_in((16, 1024), (1e-4 * math.exp(shift), 1e-1 * math.exp(shift)))
    assert there.log_learning_rate - here.log_learning_rate == pytest.approx(shift)


def test_a_published_learning_rate_goes_with_its_momentum_and_ranges_only_bound_it() -> None:
    prior = ScalingPrior.for_optimizer("sgd")
    wide = prior.anchored_in((256, 256), (1e-4, 100.0), (1e-3, 1.0))
    assert wide.log_learning_rate == pytest.approx(math.log(0.1))
    low = prior.anchored_in((256, 256), (1e-6, 1e-4), (0.1, 0.5))
    assert low.log_learning_rate == pytest.approx(math.log(1e-4))
    high = prior.anchored_in((256, 256), (10.0, 100.0), (0.01, 0.1))
    assert high.log_learning_rate == pytest.approx(math.log(10.0))


@given(st.floats(0.001, 1.0), st.floats(0.001, 1.0))
def test_the_best_learning_rate_of_sgd_is_proportional_to_one_minus_momentum(
    m: float, other: float
) -> None:
    sgd = ScalingPrior.for_optimizer("sgd").anchored_in((16, 1024), (1e-4, 10.0), (0.01, 0.5))
    here, there = (float(sgd.momentum_shift(np.array(math.log(x)))) for x in (m, other))
    assert here - there == pytest.approx(math.log(m / other), abs=1e-9)
    adam = ScalingPrior.for_optimizer("adamw").anchored_in((16, 1024), (1e-4, 10.0), (0.01, 0.5))
    assert float(adam.momentum_shift(np.array(math.log(m)))) == 0.0


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("sgd", lambda p, m: torch.optim.SGD(p, lr=1e-3, momentum=m)),
        ("rmsprop", lambda p, m: torch.optim.RMSprop(p, lr=1e-3, momentum=m)),
        ("adamw", lambda p, m: torch.optim.AdamW(p, lr=1e-3, betas=(m, 0.999), weight_decay=0.0)),
    ],
)
def test_where_momentum_adds_up_is_what_pytorch_does(
    name: str, make: Callable[[list[torch.Tensor], float], torch.optim.Optimizer]
) -> None:
    """The length of a step under a gradient that stays as it is."""

    def length(momentum: float) -> float:
        weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = make([weight], momentum)
        for _ in range(2000):
            before = weight.item()
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return abs(weight.item() - before)

    exponent = ScalingPrior.for_optimizer(name).momentum_exponent
    assert length(0.9) / length(0.0) == pytest.approx(10.0**exponent, rel=0.02)


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_momentum_of_a_reference_out_of_bounds(momentum: float) -> None:
    with pytest.raises(
        ConfigError, match=r"reference_momentum is .*; choose one from 0 to below 1"
    ):
        ScalingPrior(exponent=1.0, exponent_sd=0.1, reference_momentum=momentum)


def test_noise_scale_informs_the_critical_batch_size() -> None:
    prior = ScalingPrior.for_optimizer("sgd")
    measured = prior.with_noise_scale(5000.0)
    assert measured.critical_batch_size == pytest.approx(5000.0)
    assert measured.critical_batch_size_log_sd < prior.critical_batch_size_log_sd
    both = ScalingPrior(exponent=1.0, exponent_sd=0.2, critical_batch_size=50.0)
    assert 50.0 < (both.with_noise_scale(5000.0).critical_batch_size or 0.0) < 5000.0
    # Without a belief to weigh it against, it is taken for what it is: right within a factor of 3.
    assert measured.critical_batch_size_log_sd == pytest.approx(math.log(3.0))


def test_unknown_optimizer_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"No scaling prior for optimizer 'sgdd'; .*adamw"):
        ScalingPrior.for_optimizer("sgdd")


def test_exponent_out_of_bounds() -> None:
    with pytest.raises(ConfigError, match=r"exponent is 2\.0; choose one within \[-0\.2, 1\.2\]"):
        ScalingPrior(exponent=2.0, exponent_sd=0.1)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_what_must_be_positive(value: float) -> None:
    with pytest.raises(ConfigError, match=r"learning_rate is .*; it must be positive and finite"):
        ScalingPrior.for_optimizer("sgd").with_reference(256, value)
    with pytest.raises(ConfigError, match=r"noise_scale is .*; it must be positive and finite"):
        ScalingPrior.for_optimizer("sgd").with_noise_scale(value)

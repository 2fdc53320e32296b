"""Where training diverges, from runs that did and runs that did not."""

from __future__ import annotations

import math

import numpy as np
import optuna
import pytest
from numpy.typing import NDArray
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from bs_optuna.sampling.cliff import Cliff
from bs_optuna.sampling.space import Names
from bs_optuna.sampling.space import Space


SPACE = {
    "batch_size": IntDistribution(16, 4096, log=True),
    "lr": FloatDistribution(1e-4, 10.0, log=True),
}
SIZES = [16, 64, 1024, 4096]
RATES = [1e-4 * 10**k for k in range(6)]


def run(batch_size: int, lr: float, state: TrialState, **details: object) -> FrozenTrial:
    return optuna.create_trial(
        state=state,
        params={"batch_size": batch_size, "lr": lr},
        distributions=SPACE,
        value=1.0 if state == TrialState.COMPLETE else None,
        **details,  # type: ignore[arg-type]
    )


def cliff_of(slope: float) -> Cliff:
    """Of runs at every batch size and learning rate; training breaks above 0.03 at 256 samples."""
    trials = [
        run(b, lr, TrialState.PRUNED if lr > true_limit(b, slope) else TrialState.COMPLETE)
        for b in SIZES
        for lr in RATES
    ]
    cliff = Cliff.seen_in(trials, Space(SPACE, Names()))
    assert cliff is not None
    assert cliff.diverged == sum(t.state == TrialState.PRUNED for t in trials)
    return cliff


def at(batch_size: float) -> tuple[Space, NDArray[np.float64]]:
    return Space(SPACE, Names()), np.array([math.log(batch_size), 0.0])


def true_limit(batch_size: float, slope: float) -> float:
    return 0.03 * float((batch_size / 256) ** slope)


@pytest.mark.parametrize("slope", [0.1, 0.4, 0.7])
@pytest.mark.parametrize("batch_size", [16, 256, 4096])
def test_it_lies_between_the_runs_that_broke_and_those_that_did_not(
    slope: float, batch_size: int
) -> None:
    draws = np.exp(cliff_of(slope).draws(*at(batch_size), np.random.default_rng(0), 2000))
    truth = true_limit(batch_size, slope)
    low, high = np.quantile(draws, [0.05, 0.95])
    assert low < truth < high
    assert truth / 20 < low < high < truth * 20


def test_runs_that_contradict_each_other_leave_it_uncertain() -> None:
    states = [TrialState.PRUNED, TrialState.COMPLETE]
    trials = [
        run(b, lr, states[(i + j) % 2]) for i, b in enumerate(SIZES) for j, lr in enumerate(RATES)
    ]
    mixed = Cliff.seen_in(trials, Space(SPACE, Names()))
    assert mixed is not None
    rng, clear = np.random.default_rng(0), cliff_of(0.5)
    assert mixed.draws(*at(256), rng, 2000).std() > 1.5 * clear.draws(*at(256), rng, 2000).std()


def test_there_is_none_where_nothing_diverged() -> None:
    trials = [
        run(16, 1e-2, TrialState.COMPLETE),
        run(64, 1e-2, TrialState.PRUNED, intermediate_values={10: 2.0}),
        run(4096, 1e-1, TrialState.PRUNED, constraints={"memory": 1.0}),
        run(64, 1e-1, TrialState.FAIL),
        run(64, 1e-1, TrialState.RUNNING),
    ]
    assert Cliff.seen_in(trials, Space(SPACE, Names())) is None


@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_it_follows_momentum_as_the_runs_say(slope: float) -> None:
    """Training breaks above 1 at momentum 0, and (1 - m) ** slope elsewhere."""
    space = {**SPACE, "momentum": FloatDistribution(0.0, 0.99)}
    trials = [
        optuna.create_trial(
            state=TrialState.PRUNED if lr > (1.0 - m) ** slope else TrialState.COMPLETE,
            params={"batch_size": 64, "lr": lr, "momentum": m},
            distributions=space,
            value=None if lr > (1.0 - m) ** slope else 1.0,
        )
        for m in (0.0, 0.9, 0.99)
        for lr in np.geomspace(1e-3, 10.0, 13)
    ]
    made = Space(space, Names())
    rng = np.random.default_rng(0)
    for adds_up in (True, False):
        cliff = Cliff.seen_in(trials, made, adds_up=adds_up)
        assert cliff is not None
        for m in (0.0, 0.99):
            point = made.coordinates([{"batch_size": 64, "lr": 1.0, "momentum": m}])[0]
            low, high = np.exp(np.quantile(cliff.draws(made, point, rng, 2000), [0.05, 0.95]))
            assert low < (1.0 - m) ** slope < high
            # Without knowing that momentum matters, its effect is taken for chance.
            assert (high < 10 * low) == (adds_up or slope == 0.0)

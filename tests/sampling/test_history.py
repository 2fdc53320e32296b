"""What finished, pruned and failed trials say."""

from __future__ import annotations

import math

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from bs_optuna.sampling import attributes
from bs_optuna.sampling import history
from bs_optuna.science.prior import ScalingPrior


LR = {"lr": FloatDistribution(1e-5, 1e-1, log=True)}
DOWN = [StudyDirection.MINIMIZE]


def trial(number: int, lr: float, state: TrialState, **details: object) -> FrozenTrial:
    made = optuna.create_trial(
        state=state,
        params={"lr": lr},
        distributions=LR,
        **details,  # type: ignore[arg-type]
    )
    made.number = number
    return made


def test_a_pruned_trial_counts_as_its_last_value_and_what_others_gained_after_it() -> None:
    trials = [
        trial(0, 1e-3, TrialState.COMPLETE, value=2.0, intermediate_values={1: 5.0, 2: 3.0}),
        trial(1, 2e-3, TrialState.COMPLETE, value=2.5, intermediate_values={1: 5.0, 2: 3.0}),
        trial(2, 1e-2, TrialState.PRUNED, intermediate_values={1: 6.0}),
        trial(3, 1e-1, TrialState.PRUNED),
    ]
    seen = history.read(trials, DOWN)
    np.testing.assert_allclose(seen.values[:, 0], [2.0, 2.5, 6.0 - 2.75, math.inf])
    assert (seen.doubts[2:] > 0).all()


def test_what_a_diverged_run_reported_before_is_worth_nothing() -> None:
    good = trial(0, 1e-3, TrialState.COMPLETE, value=2.0, intermediate_values={1: 5.0})
    broken = trial(
        1,
        1e-2,
        TrialState.PRUNED,
        intermediate_values={1: 4.0},
        user_attrs={attributes.PRUNE_REASON: f"{attributes.DIVERGED}: training loss nan"},
    )
    assert history.read([good, broken], DOWN).values.tolist() == [[2.0], [math.inf]]


@pytest.mark.parametrize(
    ("state", "details", "diverged"),
    [
        (TrialState.COMPLETE, {"value": 2.0}, False),
        (TrialState.COMPLETE, {"value": math.inf}, True),
        (TrialState.PRUNED, {}, True),
        (TrialState.PRUNED, {"intermediate_values": {1: math.nan}}, True),
        (TrialState.PRUNED, {"intermediate_values": {1: 3.0}}, False),
        (TrialState.PRUNED, {"constraints": {"memory": 1.0}}, False),
        (TrialState.FAIL, {}, False),
        (TrialState.FAIL, {"intermediate_values": {1: math.nan}}, True),
        (TrialState.FAIL, {"user_attrs": {"prune_reason": "diverged: loss nan"}}, True),
        (TrialState.RUNNING, {}, False),
    ],
)
def test_which_trials_have_diverged(
    state: TrialState, details: dict[str, object], diverged: bool
) -> None:
    assert history.has_diverged(trial(0, 1e-3, state, **details)) is diverged


def test_a_failed_trial_is_superseded_by_its_retry() -> None:
    failed, other = trial(0, 1e-3, TrialState.FAIL), trial(1, 1e-2, TrialState.FAIL)
    retry = trial(2, 1e-3, TrialState.COMPLETE, value=2.0)
    more = trial(3, 3e-2, TrialState.FAIL)
    seen = history.read(history.telling([failed, other, retry, more], ["lr"]), DOWN)
    assert seen.numbers == [1, 2, 3]
    assert seen.values[0, 0] == math.inf
    assert history.telling([failed, other, retry], ["lr"]) == [retry]  # one may have any reason


def test_a_repetition_that_was_pruned_without_a_word_says_nothing() -> None:
    done = trial(0, 1e-3, TrialState.COMPLETE, value=2.0)
    again, other = trial(1, 1e-3, TrialState.PRUNED), trial(2, 1e-2, TrialState.PRUNED)
    stopped = trial(3, 1e-3, TrialState.PRUNED, intermediate_values={1: 3.0})
    assert history.telling([done, again, other, stopped], ["lr"]) == [done, other, stopped]


def test_a_violated_constraint_makes_the_value_worthless() -> None:
    good = trial(0, 1e-3, TrialState.COMPLETE, value=2.0, constraints={"memory": -1.0})
    bad = trial(1, 1e-2, TrialState.COMPLETE, value=1.0, constraints={"memory": 1.0})
    assert history.read([good, bad], DOWN).values.tolist() == [[2.0], [math.inf]]


def test_shared_space_ignores_trials_that_broke_off_early() -> None:
    early = optuna.create_trial(state=TrialState.FAIL)
    full = trial(1, 1e-3, TrialState.COMPLETE, value=1.0)
    assert history.shared_space([full, early]) == LR
    assert history.shared_space([early]) == {}


def test_random_trade_offs_reach_both_ends_of_the_front() -> None:
    front = np.array([[0.0, 1.0], [0.3, 0.3], [1.0, 0.0], [2.0, 2.0], [math.inf, math.inf]])
    rng = np.random.default_rng(0)
    best = {int(history.scalarised(front, rng).argmin()) for _ in range(200)}
    assert best == {0, 1, 2}


@pytest.mark.parametrize(
    ("readings", "believed"), [((1, 10**6), 1e3), ((5e3,), 5e3), ((10**400,), math.exp(700))]
)
def test_the_typical_noise_scale_is_the_median_of_its_logarithm(
    readings: tuple[float, ...], believed: float
) -> None:
    trials = [
        optuna.create_trial(value=1.0, user_attrs={attributes.NOISE_SCALE: r}) for r in readings
    ]
    prior = history.informed(ScalingPrior.for_optimizer("adamw"), trials)
    assert prior.critical_batch_size == pytest.approx(believed)

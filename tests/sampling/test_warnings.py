"""What CoupledSampler says, once, where it cannot use what it was told."""

from __future__ import annotations

import logging

import optuna
import pytest
from ridge_study import Objective
from ridge_study import loss
from ridge_study import objective
from ridge_study import run

from bs_optuna.errors import ConfigError
from bs_optuna.sampling import CoupledSampler


def other_names(trial: optuna.Trial) -> float:
    batch_size = trial.suggest_int("batch_size", 16, 4096, log=True)
    return loss(batch_size, trial.suggest_float("learning_rate", 1e-5, 1e-1, log=True))


def words(trial: optuna.Trial) -> float:
    batch_size = int(trial.suggest_categorical("batch_size", ["16", "64"]))
    return loss(batch_size, trial.suggest_float("lr", 1e-5, 1e-1, log=True))


def fixed(trial: optuna.Trial) -> float:
    batch_size = trial.suggest_int("batch_size", 64, 64)
    value = loss(batch_size, trial.suggest_float("lr", 1e-5, 1e-1, log=True))
    return value + trial.suggest_float("dropout", 0.0, 0.5)


def one(trial: optuna.Trial) -> float:
    return loss(64, trial.suggest_float("lr", 1e-5, 1e-1, log=True))


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("study", "there"), [(other_names, "batch_size, learning_rate"), (words, "batch_size, lr")]
)
def test_a_study_without_the_two_parameters_is_told_what_it_has(
    study: Objective, there: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="bs_optuna"):
        run(study, 6)
    (message,) = messages(caplog)
    assert message.startswith(f"The parameters of all trials are {there}; without a batch size 'b")
    assert message.endswith("Name them: CoupledSampler(batch_size=..., learning_rate=...).")


@pytest.mark.parametrize("study", [objective, fixed, one])
def test_nothing_is_said_where_there_is_nothing_to_mend(
    study: Objective, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="bs_optuna"):
        run(study, 6, sampler=CoupledSampler(cost="seconds", seed=0))
    assert not caplog.records


def test_a_cost_that_no_trial_has_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="bs_optuna"):
        run(n_trials=6, sampler=CoupledSampler(cost="joules", seed=0))
    (message,) = messages(caplog)
    assert message == (
        "No trial has a positive number as its user attribute 'joules', so cost is left out; "
        "store it: trial.set_user_attr('joules', ...)."
    )


def test_parameters_that_are_not_in_all_trials_are_told_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def conditional(trial: optuna.Trial) -> float:
        return objective(trial) + trial.suggest_float(f"only in {trial.number % 3}", 0.0, 1.0)

    with caplog.at_level(logging.WARNING, logger="bs_optuna"):
        run(conditional, 8)
    (message,) = messages(caplog)
    assert "is not in every trial, or not on the same scale, so TPE suggests it" in message


@pytest.mark.parametrize("reference", [64, ("64", "1e-3"), (64,), (64, -1.0)])
def test_a_reference_that_is_no_pair_of_numbers_is_refused(reference: object) -> None:
    with pytest.raises(ConfigError, match=r"reference=.*\(64, 1e-3\)|must be positive"):
        CoupledSampler(reference=reference)  # type: ignore[arg-type]


def test_a_name_for_two_parameters_is_refused() -> None:
    with pytest.raises(ConfigError, match="'lr' stands for two of batch_size, learning_rate"):
        CoupledSampler(momentum="lr")


@pytest.mark.parametrize("prior", [None, int])
def test_a_prior_that_is_no_name_is_refused_with_those_that_are(prior: object) -> None:
    with pytest.raises(ConfigError, match=r"No scaling prior for .*; choose one of .*, unknown\."):
        CoupledSampler(prior=prior)  # type: ignore[arg-type]

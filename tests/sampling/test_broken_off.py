"""CoupledSampler where the first trials fail before they have told anything."""

from __future__ import annotations

import logging
import math

import optuna
import pytest
from ridge_study import loss
from ridge_study import params

from bs_optuna.sampling import CoupledSampler


REFERENCE = (256, 1e-3)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    """By us; Optuna warns of each trial that fails."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("bs_optuna")]


@pytest.mark.parametrize("order", ["batch_size lr", "lr batch_size"])
@pytest.mark.parametrize(("failing", "asked"), [(1, 0), (4, 0), (1, 1)])
def test_the_first_trial_that_suggests_is_the_reference(
    order: str, failing: int, asked: int, caplog: pytest.LogCaptureFixture
) -> None:
    def objective(trial: optuna.Trial) -> float:
        for i, name in enumerate(order.split()):
            if trial.number < failing and i == asked:
                raise OSError("data not mounted yet")
            if name == "lr":
                trial.suggest_float("lr", 1e-5, 1e-1, log=True)
            else:
                trial.suggest_int("batch_size", 16, 4096, log=True)
        return loss(trial.params["batch_size"], trial.params["lr"])

    def first_three(skipped: int) -> list[dict[str, object]]:
        sampler = CoupledSampler(prior="adamw", reference=REFERENCE, seed=0)
        study = optuna.create_study(sampler=sampler)
        study.optimize(objective, n_trials=skipped + 3, catch=(OSError,))
        return params(study)[skipped:]

    with caplog.at_level(logging.WARNING, logger="bs_optuna"):
        walked = first_three(failing)
    assert walked[0] == {"batch_size": 256, "lr": pytest.approx(1e-3)}
    failing = 0
    assert walked == first_three(0)
    assert not warned(caplog)


def test_a_third_parameter_that_was_not_asked_for_yet_stays_in_the_middle(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def objective(trial: optuna.Trial) -> float:
        batch_size = trial.suggest_int("batch_size", 16, 4096, log=True)
        value = loss(batch_size, trial.suggest_float("lr", 1e-5, 1e-1, log=True))
        if trial.number == 0:
            raise OSError
        return value + trial.suggest_float("dropout", 0.0, 0.5)

    study = optuna.create_study(sampler=CoupledSampler(reference=REFERENCE, seed=0))
    with caplog.at_level(logging.WARNING, logger="bs_optuna"):
        study.optimize(objective, n_trials=3, catch=(OSError,))
    failed, first, up = study.trials
    assert first.params == {**failed.params, "dropout": 0.25}
    assert first.params["batch_size"] == 256
    assert up.params["batch_size"] > 256
    assert up.params["dropout"] == 0.25
    assert not warned(caplog)


@pytest.mark.parametrize("failures", [1, 2])
def test_a_reference_that_failed_once_is_tried_once_more(failures: int) -> None:
    """A first run fails for reasons of its own: a mistake, Ctrl-C, a worker that was killed."""

    def objective(trial: optuna.Trial) -> float:
        batch_size = trial.suggest_int("batch_size", 16, 4096, log=True)
        value = loss(batch_size, trial.suggest_float("lr", 1e-5, 1e-1, log=True))
        if trial.number < failures:
            raise OSError
        return value

    study = optuna.create_study(sampler=CoupledSampler(reference=REFERENCE, seed=0))
    study.optimize(objective, n_trials=4, catch=(OSError,))
    first, again, *others = params(study)
    assert first == again
    assert first not in others


def test_failures_without_a_batch_size_are_no_dead_end() -> None:
    def failing(trial: optuna.Trial) -> float:
        trial.suggest_float("lr", 1e-5, 1e-1, log=True)
        return math.nan

    study = optuna.create_study(sampler=CoupledSampler(reference=REFERENCE, seed=0))
    study.optimize(failing, n_trials=8)
    assert len({t.params["lr"] for t in study.trials}) >= 7


def test_a_trial_that_began_before_another_ended_walks_on_without_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    study = optuna.create_study(sampler=CoupledSampler(reference=REFERENCE, seed=0))
    with caplog.at_level(logging.WARNING, logger="bs_optuna"):
        asked = [study.ask() for _ in range(3)]
        sizes = [trial.suggest_int("batch_size", 16, 4096, log=True) for trial in asked]
        for trial, batch_size in zip(asked, sizes, strict=True):
            study.tell(trial, loss(batch_size, trial.suggest_float("lr", 1e-5, 1e-1, log=True)))
    first, up, down = study.trials
    assert first.params == {"batch_size": 256, "lr": pytest.approx(1e-3)}
    assert 3e-4 < up.params["lr"] < 3e-3
    assert 3e-4 < down.params["lr"] < 3e-3
    assert not warned(caplog)

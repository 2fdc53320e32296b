"""Processes that ask at once are given different points, where there are few or in a corner."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from ridge_study import loss

from bs_optuna.sampling import CoupledSampler
from bs_optuna.sampling import attributes
from bs_optuna.sampling.claims import Claims


SIZES = [32, 64, 128, 256]
RATES = [1e-4, 3e-4, 1e-3, 3e-3]


def chosen(trial: optuna.Trial) -> tuple[int, float]:
    return trial.suggest_categorical("batch_size", SIZES), trial.suggest_categorical("lr", RATES)


def objective(trial: optuna.Trial) -> float:
    return loss(*chosen(trial))


def workers(folder: Path, number: int, *, seed: int = 0) -> list[optuna.Study]:
    """Handles of one study, each with a sampler of its own, as several processes have."""
    storage = f"sqlite:///{folder}/study.db"
    optuna.create_study(study_name="s", storage=storage)
    return [
        optuna.load_study(study_name="s", storage=storage, sampler=CoupledSampler(seed=seed))
        for _ in range(number)
    ]


def test_workers_that_ask_before_others_have_stored_share_out_a_small_space(
    tmp_path: Path,
) -> None:
    studies = workers(tmp_path, 4)
    studies[0].optimize(objective, n_trials=4)
    for _ in range(3):
        asked = [study.ask() for study in studies]
        for trial in asked:  # all are given a point, of which none has stored the whole
            trial.suggest_categorical("batch_size", SIZES)
        for trial in asked:
            trial.study.tell(trial, loss(*chosen(trial)))
    points = {tuple(sorted(t.params.items())) for t in studies[0].trials}
    assert len(points) == 16  # all that there are


def test_workers_do_not_get_the_same_corner_of_a_space_of_any_learning_rates(
    tmp_path: Path,
) -> None:
    def in_corner(trial: optuna.Trial) -> float:
        batch_size = trial.suggest_int("batch_size", 8, 1024, log=True)
        lr = trial.suggest_float("lr", 1e-5, 1e-1, log=True)
        return -math.log(batch_size) - math.log(lr)

    studies = workers(tmp_path, 3, seed=1)
    studies[0].optimize(in_corner, n_trials=6)
    asked = [study.ask() for study in studies]
    for trial in asked:  # all are given a point, of which none has stored the whole
        trial.suggest_int("batch_size", 8, 1024, log=True)
    for trial in asked:
        trial.study.tell(trial, in_corner(trial))
    assert len({tuple(sorted(t.params.items())) for t in studies[0].trials}) == 9


def test_what_a_finished_trial_was_given_binds_nobody(tmp_path: Path) -> None:
    studies = workers(tmp_path, 2)
    studies[0].optimize(objective, n_trials=4)
    first, second = studies[0].ask(), studies[1].ask()
    given = chosen(second)
    studies[1].tell(second, state=optuna.trial.TrialState.FAIL)
    third = studies[0].ask()
    assert chosen(first) != given
    assert chosen(third) != chosen(first)
    claims = [v for k, v in studies[0].user_attrs.items() if k.startswith(attributes.SUGGESTED)]
    assert claims  # of the second, which nobody minds any more


@pytest.mark.parametrize("alone", ["one worker", "any learning rate"])
def test_where_no_point_can_be_given_twice_the_study_is_left_alone(
    tmp_path: Path, alone: str
) -> None:
    study, other = workers(tmp_path, 2)
    study.optimize(objective, n_trials=4)
    if alone == "any learning rate":
        study = optuna.create_study(sampler=CoupledSampler(seed=0))
        study.optimize(lambda t: loss(64, t.suggest_float("lr", 1e-5, 1e-1, log=True)), 4)
        study.ask()
        other = study
    other.ask()
    assert not study.user_attrs


class _AtOnce(optuna.Study):
    """A study whose workers have all claimed before one of them looks, in the first round."""

    barrier: threading.Barrier | None = None

    def set_user_attr(self, key: str, value: Any) -> None:
        super().set_user_attr(key, value)
        barrier, self.barrier = self.barrier, None
        if barrier is not None:
            barrier.wait()


@pytest.mark.parametrize("number", [2, 4])
def test_of_those_who_claim_the_same_at_once_all_end_with_different_points(
    tmp_path: Path, number: int
) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    optuna.create_study(study_name="s", storage=storage)
    all_claimed = threading.Barrier(number)
    space = {"lr": CategoricalDistribution([float(i) for i in range(32)])}
    ended: dict[int, dict[str, Any]] = {}

    def work() -> None:
        study = _AtOnce(study_name="s", storage=storage)
        study.barrier = all_claimed
        trial = study.ask()

        def again(taken: Sequence[Any]) -> dict[str, Any]:
            free = [c for c in space["lr"].choices if {"lr": c} not in taken]
            return {"lr": free[0]}

        mine = {trial.number: {"lr": 0.0}}
        begin.wait()
        ended[trial.number] = Claims().settled(study, mine, trial.number, space, (), again)

    begin = threading.Barrier(number)
    threads = [threading.Thread(target=work) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({params["lr"] for params in ended.values()}) == number


@pytest.mark.parametrize("seen", [True, False])
def test_what_others_have_finished_meanwhile_is_not_given_again(seen: bool) -> None:
    """A point that had been tried already was given because there is no other."""
    study = optuna.create_study()
    distributions = {"lr": CategoricalDistribution(RATES)}
    study.enqueue_trial({"lr": 1e-4})
    other, trial = study.ask(distributions), study.ask()
    study.tell(other, 1.0)
    params = Claims().settled(
        study,
        {trial.number: {"lr": 1e-4}},
        trial.number,
        distributions,
        {other.number} if seen else (),
        lambda taken: {"lr": 3e-4},
    )
    assert params == {"lr": 1e-4 if seen else 3e-4}


def test_the_brackets_of_hyperband_which_keep_no_attributes_are_left_alone() -> None:
    pruner = optuna.pruners.HyperbandPruner(1, 9)
    study = optuna.create_study(sampler=CoupledSampler(seed=0), pruner=pruner)
    study.optimize(objective, n_trials=10, n_jobs=2)
    assert len(study.trials) == 10
    assert not study.user_attrs

"""Processes that ask at once are given different points, where there are few or in a corner."""

from __future__ import annotations

import math
import pickle
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from ridge_study import loss
from ridge_study import run

from bs_optuna.sampling import CoupledSampler
from bs_optuna.sampling import attributes
from bs_optuna.sampling import sampler
from bs_optuna.sampling.claims import Claims
from bs_optuna.sampling.fit import Fit


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


@pytest.mark.parametrize(("low", "high", "sign"), [(1e-5, 1e-1, -1), (1e-4, 1e-1, 1)])
def test_workers_do_not_get_the_same_corner_of_a_space_of_any_learning_rates(
    tmp_path: Path, low: float, high: float, sign: int
) -> None:
    def in_corner(trial: optuna.Trial) -> float:
        batch_size = trial.suggest_int("batch_size", 8, 1024, log=True)
        lr = trial.suggest_float("lr", low, high, log=True)
        return sign * (math.log(batch_size) + math.log(lr))

    studies = workers(tmp_path, 3, seed=1)
    studies[0].optimize(in_corner, n_trials=6)
    asked = [study.ask() for study in studies]
    for trial in asked:  # all are given a point, of which none has stored the whole
        trial.suggest_int("batch_size", 8, 1024, log=True)
    for trial in asked:
        trial.study.tell(trial, in_corner(trial))
    assert len({tuple(sorted(t.params.items())) for t in studies[0].trials}) == 9


def test_what_a_trial_that_has_ended_was_given_binds_nobody() -> None:
    study = optuna.create_study()
    space = {"lr": CategoricalDistribution(RATES)}
    given = {"lr": 1e-4}

    def settled(worker: Claims, trial: optuna.Trial, *, seen: Sequence[int] = ()) -> Any:
        mine = {trial.number: given}
        return worker.settled(study, mine, trial.number, space, seen, lambda taken: {"lr": 3e-4})

    one, other = Claims(), Claims()
    first, second = study.ask(), study.ask()
    assert settled(one, first) == given
    assert settled(other, second) != given  # while it runs, and has stored nothing
    study.tell(first, state=optuna.trial.TrialState.FAIL)
    assert settled(other, second, seen=[first.number]) == given


@pytest.mark.parametrize("seed", range(3))
def test_one_that_joins_does_not_get_what_the_first_is_about_to_store(
    tmp_path: Path, seed: int
) -> None:
    study, other = workers(tmp_path, 2, seed=seed)
    study.optimize(objective, n_trials=6)
    first = study.ask()
    first.suggest_categorical("batch_size", SIZES)
    second = other.ask()
    assert chosen(second) != chosen(first)


def test_a_study_in_which_no_two_suggestions_can_be_equal_is_left_alone() -> None:
    study = run(n_trials=6)
    assert not {1e-5, 1e-1} & {t.params["lr"] for t in study.trials}
    assert not study.user_attrs


def test_attributes_of_others_are_no_claims(tmp_path: Path) -> None:
    study, other = workers(tmp_path, 2)
    study.optimize(objective, n_trials=4)
    study.set_user_attr(attributes.SUGGESTED + "by", "Alice")
    study.set_user_attr(attributes.SUGGESTED + "to", {"Bob": 1, "7": "x"})
    study.ask()
    chosen(other.ask())


def test_samplers_from_one_pickle_are_two_workers(tmp_path: Path) -> None:
    studies = workers(tmp_path, 2)
    studies[0].optimize(objective, n_trials=6)
    stored = pickle.dumps(studies[0].sampler)
    asked = []
    for study in studies:
        study.sampler = pickle.loads(stored)
        asked.append(study.ask())
        asked[-1].suggest_categorical("batch_size", SIZES)
    assert len({chosen(trial) for trial in asked}) == 2


def test_where_no_point_is_left_nobody_searches_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    class Counted(Fit):
        def __init__(self, *args: Any, **more: Any) -> None:
            nonlocal calls
            calls += 1
            super().__init__(*args, **more)

    monkeypatch.setattr(sampler, "Fit", Counted)
    studies = workers(tmp_path, 8)
    for study in studies[:2]:
        study.optimize(lambda t: t.suggest_categorical("lr", [1e-4, 1e-3]), n_trials=2)
    calls = 0
    for study in studies:
        study.ask().suggest_categorical("lr", [1e-4, 1e-3])
    assert 8 <= calls <= 16


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


class _Watched(CoupledSampler):
    def sample_relative(self, study: optuna.Study, *rest: Any) -> dict[str, Any]:
        self.seen = study
        return super().sample_relative(study, *rest)


def test_the_brackets_of_hyperband_which_keep_no_attributes_show_what_is_stored() -> None:
    watched = _Watched(seed=0)
    pruner = optuna.pruners.HyperbandPruner(1, 1)  # one bracket
    study = optuna.create_study(sampler=watched, pruner=pruner)
    study.optimize(objective, n_trials=6, n_jobs=2)
    assert not study.user_attrs
    given, space = study.trials[0].params, study.trials[0].distributions
    other = {"batch_size": 64, "lr": 1e-4}
    settled = Claims().settled(watched.seen, {9: given}, 9, space, (), lambda taken: other)
    assert settled == other

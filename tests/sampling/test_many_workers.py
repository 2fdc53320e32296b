"""CoupledSampler where trials run at the same time: in turns, in threads and in processes."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from ridge_study import Objective
from ridge_study import objective
from ridge_study import params
from ridge_study import run

from bs_optuna.sampling import CoupledSampler
from bs_optuna.sampling import sampler
from bs_optuna.sampling.fit import Fit
from bs_optuna.sampling.history import History
from bs_optuna.sampling.space import Space
from bs_optuna.science.prior import ScalingPrior


def test_ask_and_tell_with_running_trials_gives_different_points() -> None:
    study = run(n_trials=5)
    space = study.trials[0].distributions
    asked = [study.ask(space) for _ in range(6)]
    assert len({tuple(t.params.items()) for t in asked}) == 6
    spread = np.log([float(t.params["lr"]) for t in asked]).std()
    assert spread > 0.05


def test_workers_that_begin_at_once_walk_as_one_after_the_other_would() -> None:
    study = optuna.create_study(sampler=CoupledSampler(prior="adamw", seed=0))
    asked = [study.ask() for _ in range(3)]
    for trial in asked:
        trial.suggest_int("batch_size", 16, 4096, log=True)
    for trial in asked:
        trial.suggest_float("lr", 1e-5, 1e-1, log=True)
    alone = run(n_trials=3)
    assert [t.params["batch_size"] for t in asked] == [p["batch_size"] for p in params(alone)]
    for trial, before in zip(asked, params(alone), strict=True):
        assert trial.params["lr"] == pytest.approx(before["lr"])


def test_workers_that_begin_at_once_share_out_a_small_space() -> None:
    study = optuna.create_study(sampler=CoupledSampler(prior="adamw", seed=0))
    chosen = set()
    for _ in range(6):  # all run at the same time, none has a result
        trial = study.ask()
        batch_size = trial.suggest_categorical("batch_size", [64])
        chosen.add(
            (batch_size, trial.suggest_categorical("lr", [1e-4, 2e-4, 4e-4, 8e-4, 1e-3, 2e-3]))
        )
    assert len(chosen) == 6


def test_threads_share_the_sampler() -> None:
    study = run(n_trials=24, n_jobs=4)
    assert all(t.state == TrialState.COMPLETE for t in study.trials)
    assert len({tuple(sorted(p.items())) for p in params(study)}) == 24
    assert study.best_value < 2.05


def in_corner(trial: optuna.Trial) -> float:
    """Best where both are largest, which is where all workers want to be."""
    lr = trial.suggest_float("lr", 1e-5, 1e-1, log=True)
    return -float(np.log(lr * trial.suggest_int("batch_size", 16, 4096, log=True)))


def _worker(storage: str, objective: Objective) -> None:
    study = optuna.load_study(
        study_name="s", storage=storage, sampler=CoupledSampler(prior="adamw", seed=0)
    )
    study.optimize(objective, n_trials=6)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [objective, in_corner])
def test_four_processes_on_one_sqlite_study(tmp_path: Path, objective: Objective) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    optuna.create_study(study_name="s", storage=storage)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_worker, args=(storage, objective)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    study = optuna.load_study(study_name="s", storage=storage)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 24
    assert len({tuple(sorted(p.items())) for p in params(study)}) == 24


def test_what_other_brackets_have_finished_is_not_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hyperband shows a sampler only the trials of one bracket."""
    running = []

    class Watched(Fit):
        def __init__(self, space: Space, prior: ScalingPrior, seen: History, *rest, **more) -> None:  # type: ignore[no-untyped-def]
            running.append(len(seen.running))
            super().__init__(space, prior, seen, *rest, **more)

    def reported(trial: optuna.Trial) -> float:
        value = objective(trial)
        for step in range(9):
            trial.report(value, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return value

    monkeypatch.setattr(sampler, "Fit", Watched)
    pruner = optuna.pruners.HyperbandPruner(1, 9)
    study = optuna.create_study(sampler=CoupledSampler(prior="adamw", seed=0), pruner=pruner)
    study.optimize(reported, n_trials=20)
    assert len(running) > 5
    assert set(running) == {0}

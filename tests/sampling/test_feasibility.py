"""A trial that did not fit into memory, as Optuna's own samplers see it, on real storages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.samplers import BaseSampler
from optuna.samplers import CmaEsSampler
from optuna.samplers import GPSampler
from optuna.samplers import TPESampler
from optuna.trial import TrialState
from sqlalchemy.pool import NullPool

from bs_optuna.sampling.feasibility import is_out_of_memory
from bs_optuna.sampling.feasibility import mark_memory


FITS_BELOW = 0.5


def fits(trial: optuna.Trial) -> float:
    return (trial.suggest_float("x", 0.0, FITS_BELOW) - 0.4) ** 2


def out_of_memory_above(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", 0.0, 1.0)
    mark_memory(trial, fits=x <= FITS_BELOW)
    if x > FITS_BELOW:
        raise optuna.TrialPruned
    return (x - 0.7) ** 2


def database(folder: Path) -> optuna.storages.RDBStorage:
    return optuna.storages.RDBStorage(
        f"sqlite:///{folder / 'study.db'}", engine_kwargs={"poolclass": NullPool}
    )


def test_the_mark_is_stored_and_read_back(tmp_path: Path) -> None:
    study = optuna.create_study(storage=database(tmp_path), study_name="s")
    study.enqueue_trial({"x": 0.9})
    study.enqueue_trial({"x": 0.1})
    study.optimize(out_of_memory_above, n_trials=2)
    bad, good = optuna.load_study(storage=database(tmp_path), study_name="s").trials
    assert (bad.state, is_out_of_memory(bad)) == (TrialState.PRUNED, True)
    assert (good.state, is_out_of_memory(good)) == (TrialState.COMPLETE, False)
    assert study.best_trial.number == good.number


def test_marking_a_retried_trial_again_is_quiet() -> None:
    study = optuna.create_study()
    marked = optuna.create_trial(state=TrialState.WAITING, constraints={"memory": 1.0})
    study.add_trial(marked)
    study.optimize(out_of_memory_above, n_trials=1)
    assert len(study.trials) == 1


@pytest.mark.parametrize(
    "make_sampler",
    [
        lambda: TPESampler(seed=0, n_startup_trials=4),
        lambda: GPSampler(seed=0, n_startup_trials=4),
    ],
    ids=["TPE", "GP"],
)
def test_a_study_begun_without_constraints_goes_on(
    make_sampler: Callable[[], BaseSampler], tmp_path: Path
) -> None:
    # Trials of a program that knows no constraints, in the range that the second run has, too.
    begun = optuna.create_study(storage=database(tmp_path), study_name="s", sampler=make_sampler())
    begun.optimize(lambda trial: trial.suggest_float("x", 0.0, 1.0), n_trials=5)
    study = optuna.load_study(storage=database(tmp_path), study_name="s", sampler=make_sampler())
    study.enqueue_trial({"x": 0.9})
    study.optimize(out_of_memory_above, n_trials=8)
    states = [trial.state for trial in study.trials]
    assert len(states) == 13
    assert set(states) == {TrialState.COMPLETE, TrialState.PRUNED}
    assert [is_out_of_memory(t) for t in study.trials] == [s == TrialState.PRUNED for s in states]


def test_gp_sampler_would_raise_if_complete_trials_were_marked_feasible() -> None:
    """The reason for leaving complete trials unmarked; if this fails they may be marked."""
    study = optuna.create_study(sampler=GPSampler(seed=0, n_startup_trials=2))
    study.optimize(fits, n_trials=2)

    def marks_all(trial: optuna.Trial) -> float:
        trial.set_constraint("memory", 0.0)
        return fits(trial)

    study.enqueue_trial({"x": 0.1})
    study.optimize(marks_all, n_trials=1)
    with pytest.raises(ValueError, match="number of constraints must be the same"):
        study.optimize(marks_all, n_trials=1)


def test_cma_es_goes_on_and_says_that_it_ignores_the_constraint() -> None:
    pytest.importorskip("cmaes")
    study = optuna.create_study(sampler=CmaEsSampler(seed=0, n_startup_trials=2))
    study.optimize(lambda t: fits(t) + t.suggest_float("y", 0.0, 1.0), n_trials=4)
    study.enqueue_trial({"x": 0.9})
    with pytest.warns(UserWarning, match="CmaEsSampler will not use them"):
        study.optimize(out_of_memory_above, n_trials=1)
    study.optimize(lambda t: fits(t) + t.suggest_float("y", 0.0, 1.0), n_trials=4)
    assert len(study.trials) == 9


@pytest.mark.parametrize("marked", [True, False])
def test_tpe_ranks_a_marked_trial_behind_those_that_were_pruned_early(marked: bool) -> None:
    """Out of memory at the second report, against hopeless at the first."""
    history = [
        optuna.create_trial(
            state=TrialState.PRUNED,
            params={"x": i / 40 + (FITS_BELOW if late else 0.0)},
            distributions={"x": optuna.distributions.FloatDistribution(0.0, 1.0)},
            intermediate_values={0: 1.0, 1: 1.0} if late else {0: 1.0},
            constraints={"memory": 1.0} if late and marked else None,
        )
        for i in range(20)
        for late in [i % 2 == 1]
    ]
    suggested = []
    for seed in range(20):
        study = optuna.create_study(sampler=TPESampler(seed=seed, n_startup_trials=0))
        study.add_trials(history)
        suggested.append(study.ask().suggest_float("x", 0.0, 1.0))
    out_of_memory = sum(x > FITS_BELOW for x in suggested)
    # The mark turns the preference round: that is its whole use.
    assert out_of_memory <= 2 if marked else out_of_memory >= 18

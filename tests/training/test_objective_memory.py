"""Trials that run out of memory: what it changes, what it costs, and what others know of it."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import optuna
import pytest
import sqlalchemy
import torch
from limited_task import Limited
from limited_task import make_objective
from limited_task import make_task
from limited_task import run_trial
from optuna.trial import TrialState
from torch import nn

from bs_optuna.sampling import attributes
from bs_optuna.training import Budget
from bs_optuna.training.evaluation import Evaluation
from bs_optuna.training.starting_sizes import StartingSizes


def test_microbatches_change_neither_value_nor_batch(study: optuna.Study) -> None:
    whole = run_trial(make_objective(make_task(), seed=1), study, batch_size=64, lr=0.5)
    short = run_trial(make_objective(make_task(fits=8)), study, batch_size=64, lr=0.5)
    assert short.state == TrialState.COMPLETE
    assert short.value == pytest.approx(whole.value, rel=1e-5)
    stored = short.user_attrs
    assert stored[attributes.EFFECTIVE_BATCH_SIZE] == 64
    assert stored[attributes.MICROBATCH_SIZE] == 8
    assert stored[attributes.ACCUMULATION_STEPS] == 8
    assert stored[attributes.BACKOFFS] == 3
    assert (stored[attributes.MICROBATCH_FITS], stored[attributes.MICROBATCH_FAILS]) == (8, 16)
    assert stored[attributes.STEPS] == whole.user_attrs[attributes.STEPS]


def test_a_trial_starts_where_the_last_one_ended(study: optuna.Study) -> None:
    task = make_task(fits=8)
    objective = make_objective(task)
    first = run_trial(objective, study, batch_size=64, lr=0.5)
    assert first.user_attrs[attributes.MICROBATCH_FITS] == 8
    Limited.seen.clear()
    second = run_trial(make_objective(task), study, batch_size=48, lr=0.5)
    assert second.user_attrs[attributes.BACKOFFS] == 0
    assert max(Limited.seen) == 8
    assert attributes.OOM_ATTEMPTS not in second.user_attrs


def test_what_failed_in_a_study_is_not_tried_again_in_it(study: optuna.Study) -> None:
    objective = make_objective(make_task(fits=5), budget=Budget("steps", 200))
    for failures in (3, 0):  # 32, 16 and 8, and never again
        trial = run_trial(objective, study, batch_size=32, lr=0.1)
        assert trial.user_attrs[attributes.BACKOFFS] == failures
        assert trial.user_attrs[attributes.STEPS] == 200


def test_a_spike_that_passes_costs_a_study_nothing_for_good(study: optuna.Study) -> None:
    class Shared(Limited):
        """Another tenant takes the memory away while a hundred samples or so are seen."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.fits = 10 if 1000 < sum(self.seen) < 1100 else 10**9
            return super().forward(x)

    task = make_task(model=lambda: Shared(0))
    objective = make_objective(task, budget=Budget("steps", 300))
    Limited.seen.clear()
    trial = run_trial(objective, study, batch_size=32, lr=0.1)
    assert trial.user_attrs[attributes.BACKOFFS] >= 1
    assert trial.user_attrs[attributes.MICROBATCH_SIZE] == 32
    trial = run_trial(objective, study, batch_size=32, lr=0.1)
    assert trial.user_attrs[attributes.BACKOFFS] == 0
    assert trial.user_attrs[attributes.MICROBATCH_SIZE] == 32


def test_another_model_does_not_inherit_the_microbatch(study: optuna.Study) -> None:
    run_trial(make_objective(make_task(fits=8)), study, batch_size=64, lr=0.5)
    wide = make_task(model=lambda: nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 3)))
    other = run_trial(make_objective(wide), study, batch_size=64, lr=0.5)
    assert other.user_attrs[attributes.MICROBATCH_SIZE] == 64


@pytest.mark.usefixtures("ample_memory")
def test_a_sample_that_does_not_fit_prunes_with_its_reason(study: optuna.Study) -> None:
    task = make_task(fits=0)
    trial = run_trial(make_objective(task), study, batch_size=64, lr=0.5)
    assert trial.state == TrialState.PRUNED
    assert trial.user_attrs[attributes.PRUNE_REASON].startswith("memory: Out of memory")
    assert trial.user_attrs[attributes.MICROBATCH_FAILS] == 1
    assert trial.user_attrs[attributes.OOM_ATTEMPTS] == 7
    assert trial.user_attrs[attributes.BACKOFFS] == 6  # from 64 to a single sample
    Limited.seen.clear()
    again = run_trial(make_objective(task), study, batch_size=64, lr=0.5)
    assert again.user_attrs[attributes.PRUNE_REASON].startswith("memory: a single sample")
    assert not Limited.seen
    # A smaller batch may leave room for it, and is tried.
    smaller = run_trial(make_objective(task), study, batch_size=16, lr=0.5)
    assert smaller.user_attrs[attributes.PRUNE_REASON].startswith("memory: Out of memory")


def test_a_model_that_does_not_fit_prunes_too(study: optuna.Study) -> None:
    task = make_task()
    objective = make_objective(task)

    def too_large() -> nn.Module:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 419430400 bytes. Error code 12 (Cannot allocate memory)"
        )

    object.__setattr__(task, "model", too_large)
    trial = run_trial(objective, study, batch_size=64, lr=0.5)
    assert trial.state == TrialState.PRUNED
    assert trial.user_attrs[attributes.PRUNE_REASON].startswith("memory: ")


class _FullSGD(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")


def test_an_optimizer_without_room_prunes(study: optuna.Study) -> None:
    task = make_task(optimizer=lambda parameters, rate: _FullSGD(parameters, lr=rate))
    trial = run_trial(make_objective(task), study, batch_size=64, lr=0.5)
    assert trial.state == TrialState.PRUNED
    assert "optimizer.step" in trial.user_attrs[attributes.PRUNE_REASON]
    assert attributes.MICROBATCH_FAILS not in trial.user_attrs


class _SpikySGD(torch.optim.SGD):
    """Every step meets a spike of somebody else's, and finds room when it is tried again."""

    calls = itertools.count()  # of the class: what an optimizer holds itself is undone

    def step(self, closure: Any = None) -> None:
        if next(self.calls) % 2 == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        super().step()


@pytest.mark.parametrize(("oom_budget", "steps"), [(0.0, 15), (1.0, 64)])
def test_a_trial_that_loses_too_much_to_memory_is_pruned(
    study: optuna.Study, oom_budget: float, steps: int
) -> None:
    task = make_task(optimizer=lambda parameters, rate: _SpikySGD(parameters, lr=rate))
    objective = make_objective(task, oom_budget=oom_budget, budget=Budget("steps", 64))
    trial = run_trial(objective, study, batch_size=64, lr=0.5)
    assert trial.user_attrs[attributes.STEPS] == steps  # 14 = 2 log2(64) + 2 lost ones are free
    assert trial.user_attrs[attributes.OOM_ATTEMPTS] == steps
    assert 0 < trial.user_attrs[attributes.OOM_SECONDS] < trial.user_attrs[attributes.SECONDS]
    pruned = trial.user_attrs.get(attributes.PRUNE_REASON, "").startswith("memory: 15 attempts")
    assert pruned == (oom_budget == 0.0)


def test_what_was_lost_is_counted_wherever_memory_ran_out(study: optuna.Study) -> None:
    task = make_task(fits=8)
    small = run_trial(make_objective(task), study, batch_size=8, lr=0.5)
    # 32 samples, which are all, and 16 in the first evaluation.
    assert small.user_attrs[attributes.OOM_ATTEMPTS] == 2
    assert small.user_attrs[attributes.EVALUATION_FITS] == 8
    short = run_trial(make_objective(task), study, batch_size=64, lr=0.5)
    # 64, 32 and 16 samples in the first step.
    assert short.user_attrs[attributes.OOM_ATTEMPTS] == 3
    whole = run_trial(make_objective(make_task()), study, batch_size=64, lr=0.5)
    assert attributes.OOM_ATTEMPTS not in whole.user_attrs
    assert attributes.OOM_SECONDS not in whole.user_attrs


def test_what_is_lost_after_the_search_for_a_size_is_counted_too(study: optuna.Study) -> None:
    class Spiky(Limited):
        """Another tenant takes the memory away for one pass, after the first step."""

        spikes = itertools.cycle([False] * 20 + [True])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training and len(x) == self.fits and next(self.spikes):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
            return super().forward(x)

    objective = make_objective(make_task(model=lambda: Spiky(8)))
    stored = run_trial(objective, study, batch_size=64, lr=0.5).user_attrs
    assert stored[attributes.BACKOFFS] > 3  # 64, 32, 16, and what came later
    # The first evaluation tries 16.
    assert stored[attributes.OOM_ATTEMPTS] == stored[attributes.BACKOFFS] + 1


def test_what_does_not_fit_is_known_to_others_while_the_trial_goes_on(study: optuna.Study) -> None:
    learned = []

    def metric(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        learned.append(study.get_trials()[-1].user_attrs.get(attributes.MICROBATCH_FAILS))
        return outputs.mean()

    objective = make_objective(make_task(fits=8, metrics={"accuracy": metric}))
    run_trial(objective, study, batch_size=64, lr=0.5)
    assert set(learned) == {16}


@pytest.mark.usefixtures("ample_memory")
def test_what_does_not_fit_is_known_to_others_after_each_attempt(study: optuna.Study) -> None:
    told = []

    class Watched(Limited):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            stored = study.get_trials()[-1].user_attrs
            keys = attributes.MICROBATCH_FAILS, attributes.MICROBATCH_TRIED
            told.append((len(x), *map(stored.get, keys)))
            return super().forward(x)

    objective = make_objective(make_task(fits=16, model=lambda: Watched(16)))
    told.clear()  # the rehearsal
    run_trial(objective, study, batch_size=64, lr=0.5)
    assert told[:3] == [(64, None, None), (32, 64, 32), (16, 32, 16)]


def test_where_sizes_are_searched_what_others_try_is_left_to_them(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StartingSizes, "searched", lambda *_: True)
    objective = make_objective(make_task())
    key = run_trial(objective, study, batch_size=8, lr=0.5).user_attrs[attributes.MEMORY_KEY]
    other = study.ask()  # its worker will be killed: it never goes on
    other.set_user_attr(attributes.MEMORY_KEY, key)
    other.set_user_attr(attributes.MICROBATCH_TRIED, 64)
    beside = run_trial(objective, study, batch_size=64, lr=0.5).user_attrs
    assert beside[attributes.MICROBATCH_SIZE] == beside[attributes.MICROBATCH_FITS] == 32
    assert beside[attributes.MICROBATCH_TRIED] == 32
    assert beside[attributes.SAMPLES] == 512
    assert max(Limited.seen) == 32  # in all steps: it grows back to what has run here
    after = run_trial(objective, study, batch_size=64, lr=0.5).user_attrs
    assert after[attributes.MICROBATCH_SIZE] == 64


def test_where_nothing_is_searched_nothing_is_claimed(study: optuna.Study) -> None:
    stored = run_trial(make_objective(make_task()), study, batch_size=64, lr=0.5).user_attrs
    assert attributes.MICROBATCH_TRIED not in stored


@pytest.mark.parametrize("searched", [False, True])
def test_what_is_known_to_fit_costs_no_access_to_the_storage(
    monkeypatch: pytest.MonkeyPatch, searched: bool
) -> None:
    monkeypatch.setattr(StartingSizes, "searched", lambda *_: searched)
    statements: list[str] = []
    storage = optuna.storages.RDBStorage("sqlite:///:memory:")
    study = optuna.create_study(storage=storage)
    seen: list[int] = []

    class Watched(Limited):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(statements))
            return super().forward(x)

    objective = make_objective(make_task(model=lambda: Watched(64)), budget=Budget("steps", 40))
    run_trial(objective, study, batch_size=64, lr=0.5)
    sqlalchemy.event.listen(
        storage.engine, "before_cursor_execute", lambda *a: statements.append(a[2])
    )
    del seen[:], statements[:]
    run_trial(objective, study, batch_size=64, lr=0.5)
    # Between two rungs nothing is read or written; at four of the five there is a report.
    assert len(set(seen)) <= 5
    assert not [s for s in statements[: max(seen)] if attributes.MICROBATCH_TRIED in s]


def test_evaluation_halves_its_own_pieces_only(study: optuna.Study) -> None:
    task = make_task(fits=16)
    trial = run_trial(make_objective(task), study, batch_size=16, lr=0.5)
    assert trial.user_attrs[attributes.MICROBATCH_SIZE] == 16
    assert trial.user_attrs[attributes.BACKOFFS] == 0
    assert 32 in Limited.seen  # the evaluation's first try at 32 validation samples
    whole = run_trial(make_objective(make_task(), seed=-1), study, batch_size=16, lr=0.5)
    assert trial.value == pytest.approx(whole.value, rel=1e-5)


def test_an_evaluation_that_runs_out_of_memory_leaves_the_random_numbers_alone() -> None:
    """A data set is loaded anew then, which draws the seed of its loader once more."""
    data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.zeros(64, dtype=torch.long))
    task = replace(make_task(fits=16), valid_data=data)
    states = []
    for pieces in (64, 16):
        torch.manual_seed(0)
        evaluation = Evaluation(task, batch_size=pieces)
        evaluation(task.new_model(), task.valid_data, within=nullcontext())
        assert bool(evaluation.lost.attempts) is (pieces == 64)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)

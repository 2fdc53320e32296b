"""A budget of elements in whole studies: what fits is counted in longest samples."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from children import run_limited
from hypothesis import given
from hypothesis import strategies as st
from tagger import Tagger
from tagger import count
from tagger import lengths_of
from tagger import loss_fn
from tagger import texts
from tagger import trim
from torch.utils.data import Dataset

from bs_optuna.errors import TaskError
from bs_optuna.sampling import attributes
from bs_optuna.training import Budget
from bs_optuna.training import TrainingObjective
from bs_optuna.training import TrainingTask
from bs_optuna.training.loop import TrainingRun
from bs_optuna.training.memory_key import memory_key
from bs_optuna.training.memory_limit import memory_limit
from bs_optuna.training.microbatch_unit import MicrobatchUnit
from bs_optuna.training.run_settings import RunSettings
from bs_optuna.training.search import Seen


LOSS = f"{attributes.VALID_PREFIX}loss"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot limit a CPU's memory")
def test_the_longest_text_of_an_epoch_fails_nothing_under_a_real_limit() -> None:
    found = run_limited(Path(__file__).with_name("real_tokens.py"))
    assert not any(found["tokens"]["failed"])
    assert max(found["tokens"]["ran"]) == 4096
    # A number of samples that was right for four batches is wrong for the fifth.
    assert [bool(failed) for failed in found["samples"]["failed"]] == [False] * 4 + [True, False]
    halved = found["too many tokens"]["failed"][4]
    assert halved == [65536 // 2**k for k in range(len(halved))]
    assert found["too many tokens"]["ran"][4] == halved[-1] // 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot limit a CPU's memory")
def test_a_study_on_texts_of_any_length_under_a_real_limit() -> None:
    found = run_limited(Path(__file__).with_name("real_token_study.py"))
    for trials in found.values():
        assert [trial["state"] for trial in trials] == ["COMPLETE"] * 4
        assert [trial[attributes.EFFECTIVE_BATCH_SIZE] for trial in trials] == [64, 16, 48, 64]
    # What fits is known for the longest texts, and no batch of the epoch is an exception. Rarely
    # the first one fails, where the process took a little more than expected.
    first, *others = (trial[attributes.BACKOFFS] for trial in found["predicted"])
    assert first <= 1
    assert not any(others)
    first, *others = (trial[attributes.BACKOFFS] for trial in found["searched"])
    assert 1 <= first <= 3  # from 64 to 16 of the longest, or to 8: they just fit
    assert sum(others) <= 1
    steps = {
        name: [trial[attributes.ACCUMULATION_STEPS] for trial in trials]
        for name, trials in found.items()
    }
    assert all(few <= most for few, most in zip(steps["predicted"], steps["samples"], strict=True))
    assert steps["predicted"][0] <= 3 < 5 <= steps["samples"][0]
    losses = [[trial[LOSS] for trial in found[name]] for name in ("predicted", "samples")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def make_task(**changes: Any) -> TrainingTask:
    data = texts([3, 1, 9, 2])
    return TrainingTask(
        model=Tagger, train_data=data, valid_data=data, loss=loss_fn, count=count, **changes
    )


def test_a_task_knows_its_longest_sample() -> None:
    class Texts(Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            return tuple(leaf[index] for leaf in texts([3, 1, 9, 2]))

    assert make_task().longest is None
    task = make_task(lengths=lengths_of)
    assert task.longest == 9
    assert replace(task, train_data=Texts()).longest == 9


def test_a_task_refuses_lengths_that_say_nothing() -> None:
    with pytest.raises(TaskError, match="trim is for samples that vary in length; give lengths"):
        make_task(trim=trim)
    with pytest.raises(TaskError, match="lengths gave at most 0; must be positive for some"):
        _ = make_task(lengths=lambda x, y: [0] * len(x)).longest
    with pytest.raises(TaskError, match="lengths gave 1 numbers for 4 samples; must be one of"):
        _ = make_task(lengths=lambda x, y: [5]).longest


def test_sizes_in_samples_are_no_knowledge_about_sizes_in_longest_samples() -> None:
    lengths = (None, lengths_of, lambda x, y: [12] * len(x))
    tasks = [make_task(lengths=each) for each in lengths]
    tasks.append(make_task(lengths=lengths_of, trim=trim))
    device = torch.device("cpu")
    assert len({memory_key(task, device=device, limit_bytes=None) for task in tasks}) == 4


@given(st.integers(1, 50), st.integers(1, 1000))
def test_sizes_and_limits_lead_to_each_other(elements: int, limit: int) -> None:
    for unit in (MicrobatchUnit(elements), MicrobatchUnit(None)):
        assert unit.limit(unit.full_size(limit)) <= limit < unit.limit(unit.full_size(limit) + 1)
        assert unit.limit(unit.size(limit) - 1) < limit <= unit.limit(unit.size(limit))


class Roomy(Tagger):
    """Leaves traces of what it read in all instances together."""

    read: list[tuple[int, int]] = []  # noqa: RUF012

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.read.append((tokens.shape[0], tokens.shape[1]))
        return super().forward(tokens)


@pytest.mark.usefixtures("ample_memory")
def test_out_of_memory_in_a_study_is_counted_in_longest_samples() -> None:
    data = texts([12, 5, 2, 2, 1, 1, 1, 1] * 4)
    task = TrainingTask(
        model=lambda: Roomy(fits=60), train_data=data, valid_data=(data[0][:4], data[1][:4]),
        loss=loss_fn, count=count, lengths=lengths_of, trim=trim,
    )  # fmt: skip
    objective = TrainingObjective(task, budget=Budget("steps", 2), batch_size=(4, 32))
    study = optuna.create_study()
    for _ in range(2):
        study.enqueue_trial({"batch_size": 32, "lr": 1e-3})
    Roomy.read.clear()
    study.optimize(objective, n_trials=2)
    first, second = (trial.user_attrs for trial in study.trials)
    # All 32, and so 384 elements; 16 of 12 and 8 of 12 are too many as well; 4 of 12 are not.
    assert Roomy.read[:3] == [(32, 12), (16, 12), (8, 12)]
    assert (first[attributes.BACKOFFS], second[attributes.BACKOFFS]) == (3, 0)
    assert (first[attributes.MICROBATCH_FITS], first[attributes.MICROBATCH_FAILS]) == (4, 8)
    assert max(samples for samples, width in Roomy.read[4:] if width <= 2) > 4


@pytest.mark.usefixtures("ample_memory")
def test_a_batch_of_short_samples_says_little_about_what_fits() -> None:
    data = texts([12] + [5] * 63)
    task = TrainingTask(
        model=Roomy, train_data=data, valid_data=(data[0][:4], data[1][:4]),
        loss=loss_fn, count=count, lengths=lengths_of, trim=trim,
    )  # fmt: skip
    objective = TrainingObjective(task, budget=Budget("steps", 1), batch_size=(4, 32))
    study = optuna.create_study()
    study.enqueue_trial({"batch_size": 4, "lr": 1e-3})
    Roomy.read.clear()
    study.optimize(objective, n_trials=1)
    assert Roomy.read == [(4, 5)]  # it had room for 48 elements, and held 20
    (trial,) = study.trials
    assert trial.user_attrs[attributes.MICROBATCH_FITS] == 1
    assert trial.user_attrs[attributes.MICROBATCH_SIZE] == 4


def test_what_a_longer_batch_shows_to_fit_is_told_to_those_who_search_too() -> None:
    told = []

    class Listening:
        def smaller(self, failed: int, size: int) -> int:
            return size

        def learned(self, run: Seen) -> None:
            told.append(run.fits)

    data = texts([12] + [5] * 15)
    task = TrainingTask(
        model=Tagger, train_data=data, valid_data=data, loss=loss_fn, count=count,
        lengths=lengths_of, trim=trim,
    )  # fmt: skip
    settings = RunSettings(
        batch_size=4, learning_rate=1e-3, budget=Budget("steps", 8), seed=3, evaluations=1
    )
    cpu = torch.device("cpu")
    limit = memory_limit(cpu, None)
    run = TrainingRun(task, settings, device=cpu, limit=limit, search=Listening())
    assert len(list(run.evaluations())) == 1
    assert told == [1, 4]  # after the first batch, and after the one with the longest sample

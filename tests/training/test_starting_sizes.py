"""A study starts at a microbatch that fits: few failures, little waste, under real limits."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from children import run_limited
from plain_task import plain_task
from planning import CPU
from planning import MIB
from planning import Told
from planning import looks_at_values
from planning import predicted
from planning import predicted_for
from torch import nn
from torch.utils.data import Dataset

from bs_optuna.sampling import attributes
from bs_optuna.training import Budget
from bs_optuna.training import TrainingObjective
from bs_optuna.training import measured_memory
from bs_optuna.training.known_sizes import NOTHING_KNOWN
from bs_optuna.training.predicted_memory import FittingSizes
from bs_optuna.training.starting_sizes import StartingSizes


linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel enforces it on Linux only")


class Samples(Dataset[Any]):
    """Read by a loader, which draws a random number when it begins."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(16), torch.tensor(0)


def test_nothing_is_drawn_before_something_is_predicted() -> None:
    task = plain_task(train_data=Samples(), valid_data=Samples())
    state = torch.get_rng_state()
    StartingSizes(task, device=CPU, limit=Told(8 * MIB), batch_size=256)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_larger_limit_holds_more() -> None:
    small, large = (predicted(plain_task(), Told(mib * MIB)) for mib in (5, 8))
    assert small.microbatch is not None
    assert large.microbatch is not None
    assert 0 < small.microbatch < large.microbatch <= 256
    assert small.evaluation is not None
    assert small.evaluation > small.microbatch
    assert predicted(plain_task(), Told(MIB)) == FittingSizes(0, 0)
    assert predicted(plain_task(), Told(1024 * MIB)) == FittingSizes(256, 512)


def test_a_batch_that_is_too_large_itself_says_nothing_of_smaller_ones() -> None:
    """Samples of 256 KiB: of 256 the batch alone is more than the limit."""
    data = (torch.randn(1, 65536).expand(256, -1), torch.zeros(256, dtype=torch.long))
    task = plain_task(train_data=data, valid_data=data, model=lambda: nn.Linear(65536, 2))
    sizes = StartingSizes(task, device=CPU, limit=Told(40 * MIB), batch_size=256)
    assert predicted_for(sizes, 256).microbatch == 0
    assert predicted_for(sizes, 33).microbatch == 64
    assert sizes.predicted(33) == sizes.predicted(64)
    assert not sizes.predict(64, NOTHING_KNOWN, measure=True)  # known already
    assert sizes.predict(32, NOTHING_KNOWN, measure=True)


def test_a_prediction_uses_the_kernels_of_the_limit_and_turns_the_others_on_again() -> None:
    seen = []

    def model() -> nn.Module:
        seen.append(torch.backends.mkldnn.enabled)
        return nn.Linear(16, 10)

    predicted(plain_task(model=model), Told(8 * MIB))
    assert seen == [False]
    assert torch.backends.mkldnn.enabled


def test_a_size_that_alone_cannot_be_traced_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half = (predicted(plain_task(), Told(8 * MIB)).microbatch or 0) // 2
    monkeypatch.setattr(measured_memory, "is_prepared", lambda: True)  # about, not exactly

    class Looks(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x if len(x) != half or x.sum().item() > -1e9 else -x)

    model = lambda: nn.Sequential(Looks(16, 4096), nn.ReLU(), nn.Linear(4096, 10))  # noqa: E731
    found = predicted(plain_task(model=model), Told(8 * MIB))
    assert found.microbatch is not None
    assert 1 <= found.microbatch < 256


def test_what_is_measured_asks_no_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that needs more samples than that is the user's own business."""
    monkeypatch.setattr(measured_memory, "is_prepared", lambda: True)

    def needs_many(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if len(outputs) < 100:
            raise ValueError("too few")
        return outputs.mean()

    task = plain_task(loss=looks_at_values, metrics={"many": needs_many}, objective="many")
    assert predicted(task, Told(8 * MIB)).microbatch is not None


def test_what_cannot_be_traced_is_logged_and_left_to_back_off(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="bs_optuna"):
        sizes = predicted(plain_task(loss=looks_at_values), Told(8 * MIB))
    assert sizes == FittingSizes(None, None)
    assert "Memory cannot be predicted: DataDependentOutputException" in caplog.text


def test_an_evaluation_that_cannot_be_traced_leaves_the_microbatch() -> None:
    item = lambda outputs, targets: torch.tensor(outputs.sum().item())  # noqa: E731
    sizes = predicted(plain_task(metrics={"item": item}), Told(8 * MIB))
    assert sizes == FittingSizes(predicted(plain_task(), Told(8 * MIB)).microbatch, None)


def test_what_was_seen_comes_before_what_was_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StartingSizes, "predicted", lambda self, batch_size: FittingSizes(40, 100))
    objective = TrainingObjective(
        plain_task(), budget=Budget("steps", 1), batch_size=(8, 256), device=CPU
    )
    study = optuna.create_study()

    def microbatch() -> int:
        study.enqueue_trial({"batch_size": 256, "lr": 1e-3})
        study.optimize(objective, n_trials=1)
        return int(study.get_trials()[-1].user_attrs[attributes.MICROBATCH_SIZE])

    def learn(**seen: int) -> None:
        key = study.get_trials()[0].user_attrs[attributes.MEMORY_KEY]
        study.add_trial(
            optuna.create_trial(value=0.0, user_attrs={attributes.MEMORY_KEY: key, **seen})
        )

    assert microbatch() == 37  # 256 in 7 parts of at most 40
    learn(**{attributes.MICROBATCH_FITS: 64})
    assert microbatch() == 64
    learn(**{attributes.MICROBATCH_FITS: 20, attributes.MICROBATCH_FAILS: 38})
    assert microbatch() == 32  # at most 36, what is left of 40 when it has failed
    learn(**{attributes.MICROBATCH_FAILS: 30})
    assert microbatch() == 15  # half; memory that differs makes a 20 that has fitted no proof


def study_under(
    model: str, optimizer: str, mib: int, samples: int, device: str = "cpu"
) -> dict[str, Any]:
    """What a study of three trials met in a fresh process with a real limit."""
    script = Path(__file__).with_name("real_starting_sizes.py")
    found: dict[str, Any] = run_limited(script, model, optimizer, str(mib), str(samples), device)
    return found


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "optimizer", "mib", "samples"),  # more than twice what fits
    [
        ("wide", "adamw", 50, 256),
        ("wide", "sgd", 90, 512),
        ("wide", "adamw", 102, 512),
        ("wide", "sgd", 200, 1024),
        ("cnn", "adamw", 50, 1024),
        ("transformer", "sgd", 90, 1024),
    ],
)
def test_at_most_one_attempt_fails_and_at_most_a_tenth_is_wasted(
    model: str, optimizer: str, mib: int, samples: int
) -> None:
    check_study(study_under(model, optimizer, mib, samples), samples)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "mib", "samples"),
    [("wide", 250, 1024), ("wide", 700, 4096), ("cnn", 250, 4096), ("transformer", 250, 4096)],
)
def test_a_gpu_meets_and_wastes_no_more(model: str, mib: int, samples: int) -> None:
    check_study(study_under(model, "adamw", mib, samples, "cuda"), samples)


def check_study(found: dict[str, Any], samples: int) -> None:
    assert found["failures"] + found["failed evaluations"] <= 1, found
    assert found["a ninth more fails"], found
    assert found["fits"] <= samples / 2, found
    assert found["batches"][:2] == [samples, samples // 3], found


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "optimizer", "mib"), [("untraceable", "sgd", 50), ("upsampled", "adamw", 20)]
)
def test_what_fake_tensors_do_not_tell_is_measured(model: str, optimizer: str, mib: int) -> None:
    """Code that depends on data, and an operation that takes as much again inside itself."""
    found = study_under(model, optimizer, mib, 512)
    check_study(found, 512)
    assert found["failed evaluations"] == 0, found


@linux
@pytest.mark.slow
def test_what_can_neither_be_traced_nor_measured_is_halved() -> None:
    found = study_under("immeasurable", "sgd", 50, 512)
    assert found["predicted"] is None
    assert 1 <= found["failures"] <= 9  # log2(512)
    assert found["fits"] >= 16

"""A run that was cut off goes on from its file to the very bits of one that never was."""

from __future__ import annotations

import io
import logging
import os
import pickle
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparing import assert_equal
from torch import nn
from torch.utils.data import Dataset

from bs_optuna.training import TrainingTask
from bs_optuna.training.budget import Budget
from bs_optuna.training.checkpoint import CheckpointFile
from bs_optuna.training.limit import NoLimit
from bs_optuna.training.loop import TrainingRun
from bs_optuna.training.random_states import random_states
from bs_optuna.training.random_states import restore_random_states
from bs_optuna.training.run_settings import RunSettings


CPU = torch.device("cpu")
INPUTS = torch.randn(90, 4, generator=torch.Generator().manual_seed(0))
TARGETS = INPUTS.sum(1, keepdim=True)


class Noisy(Dataset[Any]):
    """Draws from the generators of PyTorch, NumPy and Python for each sample."""

    def __len__(self) -> int:
        return len(INPUTS)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.rand(4) + np.random.rand() + random.random()
        return INPUTS[index] + noise, TARGETS[index]


class Weighted(nn.Module):
    """A loss with a parameter and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return ((outputs * self.scale - targets) ** 2).mean()


def small_model(width: int = 6) -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.Linear(width, 1)
    )


def plain_adam(parameters: Any, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=learning_rate, amsgrad=True)


class Trained:
    """Runs of one task, whose models and optimizers can be looked at."""

    def __init__(
        self,
        *,
        optimizer: Any = plain_adam,
        data: Any = (INPUTS, TARGETS),
        loss: Callable[..., torch.Tensor] = nn.functional.mse_loss,
        budget: str = "samples=480",
        width: int = 6,
    ) -> None:
        self.models: list[nn.Module] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        self.budget = Budget.parse(budget)

        def model() -> nn.Module:
            self.models.append(small_model(width))
            return self.models[-1]

        def made(parameters: Any, learning_rate: float) -> torch.optim.Optimizer:
            self.optimizers.append(optimizer(parameters, learning_rate))
            return self.optimizers[-1]

        self.task = TrainingTask(
            model=model, train_data=data, valid_data=(INPUTS, TARGETS), loss=loss, optimizer=made
        )

    def run(self, path: Path | None) -> TrainingRun:
        settings = RunSettings(
            batch_size=16, learning_rate=0.05, budget=self.budget, seed=3, microbatch_size=8
        )
        file = None if path is None else CheckpointFile(path)
        return TrainingRun(self.task, settings, device=CPU, limit=NoLimit(), file=file)


def seed_foreign(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.mark.filterwarnings("ignore:BatchNorm normalizes")
@pytest.mark.parametrize("cut", [1, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"data": Noisy()},
        {"loss": Weighted()},
        {"budget": "steps=30"},
        {"optimizer": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, fused=True)},
        {"optimizer": lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True)},
    ],
    ids=["adam", "data set", "loss", "steps", "sgd", "adamw"],
)
def test_a_run_that_goes_on_ends_with_the_same_bits(
    tmp_path: Path, settings: dict[str, Any], cut: int
) -> None:
    trained = Trained(**settings)
    seed_foreign(7)
    whole = trained.run(None)
    points = list(whole.evaluations())

    seed_foreign(7)
    path = tmp_path / "folder" / "run.pt"
    first = trained.run(path).evaluations()
    for _ in range(cut):
        next(first)
    first.close()
    seed_foreign(99)  # as another process has them
    again = trained.run(path)
    assert list(again.evaluations()) == points
    assert [whole.samples, whole.steps, whole.values] == [again.samples, again.steps, again.values]
    assert_equal(trained.models[2].state_dict(), trained.models[0].state_dict())
    assert_equal(trained.optimizers[2].state_dict(), trained.optimizers[0].state_dict())
    assert not torch.equal(trained.models[1][0].weight, trained.models[0][0].weight)


@pytest.mark.filterwarnings("ignore:BatchNorm normalizes")
def test_only_the_steps_that_lack_are_done_again(tmp_path: Path) -> None:
    trained = Trained()
    first = trained.run(tmp_path / "run.pt").evaluations()
    assert [next(first).resource for _ in range(3)] == [96, 192, 288]
    first.close()
    passes = []
    again = trained.run(tmp_path / "run.pt").evaluations()
    next(again)
    trained.models[-1].register_forward_hook(
        lambda module, *_: passes.append(1) if module.training else None
    )
    assert [point.resource for point in again] == [192, 288, 384, 480]
    assert len(passes) == 2 * (480 - 288) // 16


@pytest.mark.filterwarnings("ignore:BatchNorm normalizes")
def test_a_budget_in_seconds_goes_on_with_what_is_left(tmp_path: Path) -> None:
    trained = Trained(budget="seconds=0.2")
    first = trained.run(tmp_path / "run.pt")
    cut_off = first.evaluations()
    for _ in range(4):
        next(cut_off)
    cut_off.close()
    again = trained.run(tmp_path / "run.pt")
    points = again.evaluations()
    for _ in range(4):
        next(points)
    assert again.steps == first.steps  # nothing but what the file holds
    assert again.seconds >= 0.16
    assert next(points).last


@pytest.mark.filterwarnings("ignore:BatchNorm normalizes")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"PK\x03\x04 cut off", "cannot be read"),
        (None, "of another model"),
    ],
)
def test_a_file_that_is_of_no_use_is_warned_of_and_the_run_begins_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes | None, message: str
) -> None:
    path = tmp_path / "run.pt"
    loss = Weighted()
    trained = Trained(loss=loss)
    expected = list(trained.run(None).evaluations())
    if content is None:
        next(Trained(width=7, loss=loss).run(path).evaluations())
    else:
        path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert list(trained.run(path).evaluations()) == expected
    assert message in caplog.text
    assert len(caplog.records) == 1


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harmed",)


def test_a_file_runs_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"modules": Harmful()}, "run.pt")
    assert CheckpointFile(Path("run.pt")).read() is None
    assert not Path("harmed").exists()
    assert "cannot be read" in caplog.text
    pickle.load(io.BytesIO(pickle.dumps(Harmful())))  # elsewhere it would
    assert Path("harmed").exists()


@pytest.mark.filterwarnings("ignore:BatchNorm normalizes")
def test_a_file_that_cannot_be_written_costs_no_trial(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert len(list(Trained().run(tmp_path / "file" / "run.pt").evaluations())) == 5
    assert len(caplog.records) == 4
    assert "cannot be written" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="others have no device that is always full")
def test_a_full_disk_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run.pt.part").symlink_to("/dev/full")
    CheckpointFile(tmp_path / "run.pt").write({"weights": torch.zeros(2**20)})
    assert "cannot be written ([Errno 28] No space left on device)" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_cannot_be_stored_leaves_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = CheckpointFile(tmp_path / "run.pt")
    file.write({"steps": 1})
    file.write({"steps": 2, "function": lambda: None})
    assert "cannot be written" in caplog.text
    assert file.read() == {"steps": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]
    (tmp_path / "run.pt.part").write_text("what a killed process left")
    file.remove()
    assert list(tmp_path.iterdir()) == []
    file.remove()


def test_random_states_come_back_from_a_file(tmp_path: Path) -> None:
    file = CheckpointFile(tmp_path / "run.pt")
    seed_foreign(1)
    np.random.standard_normal()  # the second one of a pair is part of the state
    file.write(random_states(CPU))

    def drawn() -> list[float]:
        return [random.random(), np.random.standard_normal(), float(torch.rand(1))]

    expected = drawn()
    seed_foreign(2)
    stored = file.read()
    assert stored is not None
    restore_random_states(stored, CPU)
    assert drawn() == expected


@pytest.mark.gpu
def test_a_run_on_a_gpu_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    device = torch.device("cuda")
    file = CheckpointFile(tmp_path / "run.pt")
    torch.cuda.manual_seed(1)
    file.write(random_states(device))
    expected = torch.rand(4, device=device)
    torch.cuda.manual_seed(2)
    stored = file.read()
    assert stored is not None
    restore_random_states(stored, device)
    assert torch.equal(torch.rand(4, device=device), expected)

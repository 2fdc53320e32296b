"""The table of a dry run says what each batch size would need; nothing is stored."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from children import run_python
from plain_task import plain_task
from rich.console import Console
from torch import nn

from bs_optuna.config import StudyConfig
from bs_optuna.errors import ConfigError
from bs_optuna.errors import TaskError
from bs_optuna.errors import UntraceableError
from bs_optuna.report.forecast import forecast
from bs_optuna.tasks import digits
from bs_optuna.training import TrainingTask


WIDE_TASK = Path(__file__).parents[1] / "system" / "wide_task.py"


def make_task(**changes: Any) -> TrainingTask:
    return plain_task(512, **changes)


def rows(task: TrainingTask, **settings: Any) -> list[list[str]]:
    """The cells of each row."""
    console = Console(width=120)
    with console.capture() as capture:
        console.print(forecast(StudyConfig(device="cpu", **settings), task))
    lines = [line for line in capture.get().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_every_batch_size_is_cut_to_what_fits() -> None:
    found = rows(make_task(), memory_limit="8MiB", batch_size="24:300")
    assert [row[0] for row in found] == ["24", "32", "64", "128", "256", "300"]
    assert all(row[4] == "yes" for row in found)
    assert all(float(row[3].removesuffix(" MiB")) < 8 for row in found)
    most = max(int(row[1]) for row in found)
    assert 16 < most < 256
    for batch_size, microbatch, steps in (map(int, row[:3]) for row in found):
        assert steps * microbatch >= batch_size > (steps - 1) * microbatch
        assert microbatch <= most


def test_a_model_that_fits_with_no_microbatch_is_said_not_to() -> None:
    found = rows(make_task(), memory_limit="1MiB", batch_size="16:32")
    assert [row[:3] + row[4:] for row in found] == [
        ["16", "1", "16", "no"],
        ["32", "1", "32", "no"],
    ]


def test_without_a_limit_the_memory_of_the_machine_counts() -> None:
    assert [row[1] for row in rows(make_task(), batch_size="16:64")] == ["16", "32", "64"]


def test_the_largest_microbatch_and_the_optimizer_of_the_settings_count() -> None:
    small, large = (
        rows(make_task(), batch_size="64", microbatch_size=8, optimizer=name)[0]
        for name in ("sgd", "adamw")
    )
    assert small[1:3] == large[1:3] == ["8", "8"]
    assert float(small[3].removesuffix(" MiB")) < float(large[3].removesuffix(" MiB"))


@pytest.mark.parametrize(("width", "unit"), [(4, "KiB"), (4096, "MiB")])
def test_peaks_are_in_the_unit_that_suits_the_largest(width: int, unit: str) -> None:
    model = lambda: nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 10))  # noqa: E731
    peaks = [row[3] for row in rows(plain_task(model=model), batch_size="1:256")]
    assert {peak.rpartition(" ")[2] for peak in peaks} == {unit}
    values = [float(peak.partition(" ")[0]) for peak in peaks]
    assert values == sorted(values)
    assert 1 <= values[-1] < 1024


def test_a_task_that_needs_values_cannot_be_forecast() -> None:
    loss = lambda o, t: torch.tensor(o.sum().item())  # noqa: E731
    with pytest.raises(UntraceableError, match="run it to see what fits"):
        forecast(StudyConfig(device="cpu"), make_task(loss=loss))


def test_a_device_of_unknown_memory_asks_for_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    named = "bs_optuna.report.forecast.device_named"  # there is none on this machine
    monkeypatch.setattr(named, lambda name: torch.device(name))
    with pytest.raises(ConfigError, match=r"device=meta; .*add --memory-limit"):
        forecast(StudyConfig(device="meta"), make_task())


def test_what_a_study_would_refuse_is_not_forecast() -> None:
    with pytest.raises(TaskError, match="batch_size=4096 is more than the 1257 training samples"):
        forecast(StudyConfig(device="cpu", batch_size="1024:4096"), digits.task())


def test_by_default_no_batch_is_larger_than_the_data() -> None:
    config = StudyConfig(device="cpu")
    assert config.for_samples(300).batch_size == (16, 300)
    assert config.for_samples(9).batch_size == (9, 9)
    assert config.for_samples(10**6) == config
    asked = StudyConfig(batch_size="16:512")
    assert asked.for_samples(300) is asked


def test_a_dry_run_prints_the_table_and_leaves_nothing(tmp_path: Path) -> None:
    run = run_python(
        *("-m", "bs_optuna.tune", str(WIDE_TASK), "--memory-limit", "12MiB"),
        *("--device", "cpu", "--dry-run"),
        folder=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert "Predicted memory of wide on cpu, limit 12.0 MiB" in run.stdout
    assert run.stdout.count("yes") == 6
    assert not list(tmp_path.iterdir())


UNTOLD = """
import torch
from torch import nn
from bs_optuna.training import TrainingTask

class Upsampled(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(1, 16, 3)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        images = self.convolution(x)
        images = nn.functional.interpolate(images, scale_factor=2, mode="bilinear")
        return self.head(images.mean((2, 3)))

def looks(outputs, targets):
    loss = nn.functional.cross_entropy(outputs, targets)
    return loss if loss.item() > 0 else -loss

def wide():
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 16384), nn.ReLU(), nn.Linear(16384, 10))

def make(model, loss):
    data = torch.randn(512, 1, 16, 16), torch.zeros(512, dtype=torch.long)
    return TrainingTask(
        name="untold", model=model, train_data=data, valid_data=data, loss=loss, optimizer="sgd"
    )

def inside():
    return make(Upsampled, nn.functional.cross_entropy)

def untraceable():
    return make(wide, looks)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel enforces it on Linux only")
@pytest.mark.slow
@pytest.mark.parametrize(("task", "limit"), [("inside", "20MiB"), ("untraceable", "90MiB")])
def test_what_fake_tensors_do_not_tell_is_measured_as_a_study_does(
    task: str, limit: str, tmp_path: Path
) -> None:
    (tmp_path / "untold.py").write_text(UNTOLD, encoding="utf-8")
    command = ("-m", "bs_optuna.tune", f"untold.py:{task}", "--memory-limit", limit)
    command += ("--device", "cpu", "--batch-size", "512:512")
    dry = run_python(*command, "--dry-run", folder=tmp_path)
    assert "Measured memory of untold on cpu" in dry.stdout, dry.stderr
    promised = re.search(r"512 │ +(\d+) │ +(\d+) │.*yes", dry.stdout)
    assert promised is not None, dry.stdout
    assert 16 < int(promised[1]) < 256
    run = run_python(*command, "--trials", "1", "--budget", "steps=2", folder=tmp_path)
    used = re.search(r"^trial 0: .* microbatch (\d+) x (\d+),", run.stdout, re.M)
    assert used is not None, run.stdout + run.stderr
    # Measured in another process, to some pages.
    assert int(used[1]) == pytest.approx(int(promised[1]), rel=0.05)
    assert "0 backed off to smaller microbatches" in run.stdout


def test_samples_that_vary_are_said_to_be_taken_for_the_longest() -> None:
    task = make_task(lengths=lambda inputs, targets: [3] * len(inputs))
    settings: dict[str, Any] = {"device": "cpu", "memory_limit": "8MiB", "batch_size": "24:300"}
    title = str(forecast(StudyConfig(**settings), task).title)
    assert title.endswith("limit 8.0 MiB, all samples as long as the longest")

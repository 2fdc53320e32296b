"""Two commands on one study under a real limit search for what fits as one would alone."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from bs_optuna.sampling import attributes
from bs_optuna.study import open_study


WIDE_TASK = Path(__file__).with_name("wide_task.py")
# What it does depends on its data, so nothing is predicted.
BRANCHING = """

class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        {do}
        return x if float(x.sum()) < 1e9 else -x
"""
# The next batch may hold longer samples, so nothing is measured either.
IMMEASURABLE = "lengths=lambda inputs, targets: [1] * len(inputs),"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot limit a CPU's memory"),
]


def write_task(folder: Path, *, do: str = "pass", measurable: bool = True) -> None:
    text = WIDE_TASK.read_text(encoding="utf-8")
    text = text.replace("nn.Conv2d(1, 64", "Branching(), nn.Conv2d(1, 64")
    if not measurable:
        text = text.replace("loss=nn", f"{IMMEASURABLE}\n        loss=nn")
    (folder / "wide.py").write_text(text + BRANCHING.format(do=do), encoding="utf-8")


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = ["-m", "bs_optuna.tune", "wide.py", "--budget", "samples=300", "--final-runs", "0"]
    return subprocess.Popen(
        [sys.executable, *command, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )


def trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    return open_study(storage=f"sqlite:///{folder}/studies/wide.db", name="wide").get_trials()


@pytest.mark.parametrize(
    ("model", "batch_sizes", "trials_in_all"),
    [
        ("traced", "16:512", 10),
        ("measured", "16:512", 10),
        ("searched", "16:512", 20),
        ("searched", "512:512", 10),
    ],
)
def test_two_workers_search_for_what_fits_once(
    tmp_path: Path, model: str, batch_sizes: str, trials_in_all: int
) -> None:
    write_task(tmp_path, measurable=model != "searched")
    if model == "traced":
        (tmp_path / "wide.py").write_text(WIDE_TASK.read_text(encoding="utf-8"), encoding="utf-8")
    searched = ("--trials", str(trials_in_all), "--batch-size", batch_sizes)
    arguments = ("--memory-limit", "12MiB", *searched)
    workers = [start(tmp_path, *arguments) for _ in range(2)]
    assert [worker.wait(timeout=500) for worker in workers] == [0, 0]
    found = trials(tmp_path)
    assert {t.state for t in found} <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert trials_in_all <= len(found) <= trials_in_all + 1  # the other was at one
    assert all(
        t.user_attrs[attributes.EFFECTIVE_BATCH_SIZE] == t.params["batch_size"] for t in found
    )
    attempts = sum(t.user_attrs.get(attributes.OOM_ATTEMPTS, 0) for t in found)
    largest = max(t.params["batch_size"] for t in found)
    smallest = min(t.user_attrs[attributes.MICROBATCH_FITS] for t in found)
    # Of what is measured each process may be wrong once: neither waits for the other.
    most = {"traced": 1, "measured": 2, "searched": math.log2(largest / smallest) + 1}
    assert attempts <= most[model]
    # Whoever began low to keep clear of the other does not stay there in the trials after it.
    best = max(t.user_attrs[attributes.MICROBATCH_FITS] for t in found)
    late = [t.user_attrs[attributes.MICROBATCH_FITS] for t in found[-trials_in_all // 2 :]]
    assert min(late) > best / 2


def test_a_command_that_goes_on_with_a_study_measures_too(tmp_path: Path) -> None:
    """What fits is known, but not how much more would."""
    write_task(tmp_path)
    arguments = ("--memory-limit", "40MiB", "--batch-size", "16:512")
    for count in (1, 3):  # the first trial is in the middle of the range
        assert start(tmp_path, *arguments, "--trials", str(count)).wait(timeout=300) == 0
    storage = f"sqlite:///{tmp_path}/studies/wide.db"
    study = optuna.load_study(study_name="wide", storage=storage)
    study.enqueue_trial({"batch_size": 512, "lr": 1e-3})
    assert start(tmp_path, *arguments, "--trials", "5").wait(timeout=300) == 0
    found = trials(tmp_path)
    assert not any(t.user_attrs.get(attributes.OOM_ATTEMPTS) for t in found)


def test_a_claim_of_a_killed_worker_does_not_bind_the_others(tmp_path: Path) -> None:
    # In the first step: not in the rehearsal, of two samples, nor in a prediction on fake tensors.
    dies = "self.training and len(x) > 2 and type(x) is torch.Tensor"
    # The code stays the same, as what fits is remembered for that.
    (tmp_path / "deadly").touch()
    deadly = f"os.path.exists({str(tmp_path / 'deadly')!r})"
    kill = f"import os; {dies} and {deadly} and os.kill(os.getpid(), 9)"
    write_task(tmp_path, do=kill, measurable=False)
    arguments = ("--memory-limit", "2GiB", "--trials", "3", "--batch-size", "256:256")
    assert start(tmp_path, *arguments).wait(timeout=300) == -9
    (killed,) = trials(tmp_path)
    assert killed.state == TrialState.RUNNING
    assert killed.user_attrs[attributes.MICROBATCH_TRIED] == 256

    (tmp_path / "deadly").unlink()
    assert start(tmp_path, *arguments).wait(timeout=300) == 0
    still, *others = trials(tmp_path)
    assert still.state == TrialState.RUNNING  # nobody knows: it gave signs of life until just now
    sizes = [trial.user_attrs[attributes.MICROBATCH_SIZE] for trial in others]
    assert sizes == [128, 256, 256]
    assert not any(trial.user_attrs[attributes.BACKOFFS] for trial in others)

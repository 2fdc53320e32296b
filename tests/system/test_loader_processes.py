"""Tasks that read their data by processes of a DataLoader, in a worker process or not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from optuna.trial import TrialState

from bs_optuna.sampling import attributes
from bs_optuna.study import open_study


TASK = """
import multiprocessing
import os
import signal
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from bs_optuna.training import TrainingTask

X = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
PROCESSES = Path("processes")


IN_WORKER = multiprocessing.parent_process() is not None


class Raw(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        with PROCESSES.open("a") as file:
            file.write(f"{os.getpid()} ")
        time.sleep(float(os.environ.get("SLOW", 0)))
        if IN_WORKER and index == 150 and os.path.exists("deadly reader"):
            os.remove("deadly reader")
            time.sleep(0.3)  # until it is waited for
            os.kill(os.getpid(), signal.SIGKILL)
        return X[index], (X[index, 0] > 0).long()


class Read(Dataset):
    # Through processes, a part at a time, which then stay.
    def __init__(self, indices):
        self.indices = indices
        self.samples = None

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        if self.samples is None:
            context = os.environ.get("CONTEXT")
            loader = DataLoader(
                Raw(), 100, num_workers=2, persistent_workers=True, multiprocessing_context=context
            )
            self.loader = iter(loader)
            pairs = list(self.loader)
            self.samples = [torch.cat(leaves) for leaves in zip(*pairs)]
        x, y = self.samples
        return x[self.indices[index]], y[self.indices[index]]


class Net(nn.Linear):
    def forward(self, x):
        if self.training and len(x) == 32:
            if os.path.exists("deadly"):
                os.remove("deadly")
                os.kill(DATA.loader._workers[0].pid, signal.SIGKILL)
                time.sleep(2)
            if os.path.exists("deadly for all"):
                os.remove("deadly for all")
                helper = multiprocessing.Process(target=time.sleep, args=(100,))
                helper.start()
                with PROCESSES.open("a") as file:
                    file.write(f"{helper.pid} ")
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


DATA = Read(range(200))


def task():
    return TrainingTask(
        name="read",
        model=lambda: Net(8, 2),
        train_data=DATA,
        valid_data=Read(range(200, 300)),
        loss=nn.functional.cross_entropy,
    )
"""
ARGUMENTS = ("--trials", "2", "--batch-size", "32:32", "--budget", "steps=8", "--final-runs", "0")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="others start processes another way"),
]


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    (folder / "read.py").write_text(TASK, encoding="utf-8")
    with (folder / "output").open("w") as output:  # a pipe is held open by what is left behind
        return subprocess.Popen(
            [sys.executable, "-m", "bs_optuna.tune", "read.py", *ARGUMENTS, *arguments],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end(run: subprocess.Popen[bytes], folder: Path) -> str:
    """What it has printed by its end."""
    run.wait(timeout=120)
    return (folder / "output").read_text()


def processes(folder: Path) -> set[int]:
    try:
        return {int(word) for word in (folder / "processes").read_text().split()}
    except FileNotFoundError:
        return set()


def alive(found: set[int]) -> set[int]:
    return {process for process in found if Path(f"/proc/{process}").exists()}


def wait_until_gone(found: set[int]) -> None:
    deadline = time.monotonic() + 20
    while alive(found) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(found)


@pytest.mark.parametrize(
    ("arguments", "context"),
    [
        ((), "spawn"),
        (("--isolate",), "fork"),
        (("--isolate",), "spawn"),
        (("--workers", "2"), "fork"),
    ],
)
def test_they_read_for_any_kind_of_worker(
    arguments: tuple[str, ...], context: str, tmp_path: Path
) -> None:
    run = start(tmp_path, *arguments, CONTEXT=context)
    output = end(run, tmp_path)
    assert run.returncode == 0, output
    assert "2 complete" in output
    wait_until_gone(processes(tmp_path))


@pytest.mark.parametrize("deadly", ["deadly", "deadly for all"])
def test_one_that_is_killed_costs_an_attempt(deadly: str, tmp_path: Path) -> None:
    """Alone, or with its worker, of which another process is left."""
    (tmp_path / deadly).touch()
    run = start(tmp_path, "--isolate")
    output = end(run, tmp_path)
    assert run.returncode == 0, output
    killed, *others = open_study(
        storage=f"sqlite:///{tmp_path}/studies/read.db", name="read"
    ).get_trials()
    assert killed.state == TrialState.FAIL
    assert killed.user_attrs[attributes.PRUNE_REASON].startswith("killed by SIGKILL")
    assert [trial.state for trial in others] == [TrialState.COMPLETE] * 2
    left = alive(processes(tmp_path))  # by a killed process, which nobody waits for
    assert bool(left) == (deadly == "deadly for all")
    for process in left:
        os.kill(process, signal.SIGKILL)


def test_one_that_is_killed_before_any_trial_ends_no_study(tmp_path: Path) -> None:
    (tmp_path / "deadly reader").touch()
    run = start(tmp_path, "--isolate")
    output = end(run, tmp_path)
    assert run.returncode == 0, output
    assert not (tmp_path / "deadly reader").exists()
    assert "2 complete" in output


def test_none_outlives_a_study_that_is_interrupted_while_they_begin(tmp_path: Path) -> None:
    run = start(tmp_path, "--isolate", SLOW="0.5")
    deadline = time.monotonic() + 60
    while len(processes(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(processes(tmp_path)) >= 2
    os.killpg(run.pid, signal.SIGINT)
    output = end(run, tmp_path)
    assert run.returncode == 130, output
    assert "Traceback" not in output
    wait_until_gone(processes(tmp_path))

"""Memory that ends for real: the kernel kills in a control group, and a study goes on or is spared.

Such groups are what containers and batch systems give a process of a machine.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from control_group import ControlGroup
from memory_group import memory_group
from memory_group import python


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's"),
]

WIDE_TASK = Path(__file__).with_name("wide_task.py")
# 520 samples of about 1 MB of activations each; a process without any takes some 300 MB.
BATCH = ("--batch-size", "520:520", "--budget", "samples=1040", "--final-runs", "0")
# What fake tensors do not see, so that too much is begun with, or what takes memory even with them,
# so that the prediction kills; and a parent that is larger than its worker when memory is gone, 1.4
# of 2.5 GiB, which the kernel would kill if workers did not offer themselves.
UNSEEN = """
import multiprocessing
import numpy as np
import torch
from torch import nn
from wide_task import task as wide

BALLAST = np.ones(144_000_000 if multiprocessing.parent_process() is None else 1)

class Hidden(nn.Module):
    def __init__(self, model, most, even_fake):
        super().__init__()
        self.model = model
        self.most = most
        self.even_fake = even_fake

    def forward(self, x):
        if self.training and len(x) > self.most and (self.even_fake or type(x) is torch.Tensor):
            assert (np.ones((len(x), 1_000_000)) == 1).all()
        return self.model(x)

def make(most, even_fake):
    task = wide()
    return type(task)(
        name="unseen", model=lambda: Hidden(task.model(), most, even_fake), loss=task.loss,
        train_data=task.train_data, valid_data=task.valid_data,
    )

def hidden():
    return make(100, even_fake=False)

def predicting():
    return make(260, even_fake=True)
"""


def tune(group: ControlGroup, folder: Path, task: str, *arguments: str) -> str:
    run = python(group, "-m", "bs_optuna.tune", task, *BATCH, *arguments, folder=folder)
    assert run.returncode == 0, f"{run.returncode}\n{run.stdout}\n{run.stderr}"
    return run.stdout


def microbatches(output: str) -> list[int]:
    return [int(size) for size in re.findall(r"^trial .* microbatch (\d+)", output, re.M)]


def test_a_study_without_a_limit_plans_with_what_its_container_has_left(tmp_path: Path) -> None:
    """Begun with the whole batch, as it was before, it would be killed."""
    with memory_group(700) as group:
        output = tune(group, tmp_path, str(WIDE_TASK), "--trials", "2")
        kills = group.kills
    assert kills == 0
    assert len(microbatches(output)) == 2
    assert all(20 < size < 260 for size in microbatches(output)), output


def test_workers_share_what_is_left(tmp_path: Path) -> None:
    with memory_group(1400) as group:
        output = tune(group, tmp_path, str(WIDE_TASK), "--trials", "3", "--workers", "2")
        kills = group.kills
    assert kills == 0
    assert len(microbatches(output)) == 3


@pytest.mark.parametrize(
    ("task", "died"),
    [("hidden", r"with microbatch_size=\d+"), ("predicting", "before it trained")],
)
def test_a_worker_that_the_kernel_kills_costs_an_attempt_and_never_the_parent(
    task: str, died: str, tmp_path: Path
) -> None:
    (tmp_path / "unseen.py").write_text(UNSEEN, encoding="utf-8")
    (tmp_path / "wide_task.py").write_text(WIDE_TASK.read_text("utf-8"), encoding="utf-8")
    with memory_group(2600) as group:
        output = tune(group, tmp_path, f"unseen.py:{task}", "--trials", "2", "--isolate")
        kills = group.kills
    first, *others = re.findall(r"killed by SIGKILL ([^)]*)", output)
    assert re.fullmatch(died, first), output
    assert len(others) <= 1, output  # of the same trial: what fitted then is enough for the next
    assert kills == 1 + len(others)
    assert len(microbatches(output)) == 2, output
    assert all(size <= 260 for size in microbatches(output)), output

"""Programs under a memory limit, each in a fresh process with the settings that it takes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

from bs_optuna.training.limit_environment import LIMIT_ENVIRONMENT


PRELUDE = """
import gc
import resource
import warnings
import torch
from torch import nn
from bs_optuna.training.memory_limit import memory_limit
from bs_optuna.training.oom import classify, empty_caches, release
from bs_optuna.training.process_memory import process_memory

warnings.simplefilter("error")
MIB = 2**20
UNLIMITED = resource.getrlimit(resource.RLIMIT_DATA)


def mlp():
    return nn.Sequential(nn.Linear(64, 2048), nn.BatchNorm1d(2048), nn.ReLU(), nn.Linear(2048, 10))


def cnn():
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(2048, 10),
    )


class Training:
    def __init__(self, build):
        torch.manual_seed(0)
        self.model = build()
        self.optimizer = torch.optim.AdamW(self.model.parameters())

    def step(self, size):
        self.optimizer.zero_grad(set_to_none=True)
        inputs, targets = torch.randn(size, 64), torch.zeros(size, dtype=torch.long)
        loss = nn.functional.cross_entropy(self.model(inputs), targets)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def attempt(training, limit, size):
    "The verdict of a step of this size under the limit, None where it fits."
    try:
        with limit.active():
            training.step(size)
        return None
    except Exception as error:
        failure = error
    verdict = classify(failure)
    assert verdict is not None and verdict.kind == "cpu", repr(failure)
    release(failure)
    training.optimizer.zero_grad(set_to_none=True)
    empty_caches()
    return verdict
"""


def run(program: str, *, environment: dict[str, str] | None = None) -> str:
    """Runs a program in a fresh process and returns what it printed."""
    settings = LIMIT_ENVIRONMENT if environment is None else environment
    inherited = {k: v for k, v in os.environ.items() if k not in LIMIT_ENVIRONMENT}
    child = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(program)],
        env=inherited | {"OMP_NUM_THREADS": "1"} | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, f"exit status {child.returncode}\n{child.stderr}"
    return child.stdout.strip()

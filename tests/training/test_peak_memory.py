"""The measured peak agrees with PyTorch's profiler where the allocator gives memory back."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from bs_optuna.training.limit_environment import LIMIT_ENVIRONMENT
from bs_optuna.training.peak_memory import PeakMemory


PROGRAM = """
import torch
from torch import nn
from bs_optuna.training.peak_memory import PeakMemory

torch.backends.mkldnn.enabled = False
MIB = 2**20


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 10))


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 14 * 14, 10),
    )


def train(build, size):
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(
            model(torch.randn(size, 1, 28, 28)), torch.zeros(size, dtype=torch.long)
        )
        loss.backward()
        optimizer.step()


def profiled(build, size):
    with torch.profiler.profile(profile_memory=True) as profile:
        train(build, size)
    now = peak = 0
    records = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for record in sorted(records, key=lambda record: record.start_ns()):
        now += record.nbytes()
        peak = max(peak, now)
    return peak


measure = PeakMemory(torch.device("cpu"))
for build, size in [(mlp, 4096), (cnn, 64), (cnn, 128), (cnn, 64)]:
    truth = profiled(build, size)
    measure.start()
    train(build, size)
    print(build.__name__, size, truth, measure.bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak")
def test_the_measured_peak_is_near_the_profilers() -> None:
    """Also after a larger training, whose freed memory must not hide a smaller one."""
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        env=os.environ | LIMIT_ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    rows = [line.split() for line in child.stdout.splitlines() if line[:3] in ("mlp", "cnn")]

    assert len(rows) == 4
    for name, size, truth, measured in rows:
        ratio = int(measured) / int(truth)
        assert 0.95 < ratio < 1.25, (name, size, truth, measured)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak")
def test_start_forgets_what_was_before() -> None:
    measure = PeakMemory(torch.device("cpu"))
    measure.start()
    torch.ones(2**26, dtype=torch.uint8)
    large = measure.bytes()
    measure.start()
    small = measure.bytes()

    assert large is not None
    assert small is not None
    assert large > 60 * 2**20
    assert small < 8 * 2**20


def test_nothing_is_claimed_where_nothing_is_known() -> None:
    unknown = PeakMemory(torch.device("meta"))
    unknown.start()

    assert unknown.bytes() is None
    assert PeakMemory(torch.device("cpu")).bytes() is None  # never started

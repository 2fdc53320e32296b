"""A storage that fails in the middle of a study: one line for the user, from a worker too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


# In its second training no file can grow any more, as on a full disk.
TASK = """
import resource
import torch
from bs_optuna.training import TrainingTask

models = 0

def model():
    global models
    models += 1
    if models == 3:  # the first is made to look at the task
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    return torch.nn.Linear(1, 1)

def task():
    x = torch.linspace(-1, 1, 128)[:, None]
    data = (x, 2 * x)
    return TrainingTask(
        name="full", model=model, loss=torch.nn.MSELoss(), train_data=data, valid_data=data
    )
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("storage", "reason"),
    [("sqlite:///full.db", "disk I/O error"), ("full.journal", "[Errno 27] File too large")],
)
@pytest.mark.parametrize("where", [(), ("--isolate",)], ids=["alone", "in a worker"])
def test_it_is_one_line_that_names_the_storage(
    tmp_path: Path, storage: str, reason: str, where: tuple[str, ...]
) -> None:
    (tmp_path / "full.py").write_text(TASK)
    run = subprocess.run(
        [
            sys.executable, "-W", "error", "-m", "bs_optuna.tune", "full.py", "--storage", storage,
            "--batch-size", "8:16", "--budget", "steps=20", "--final-runs", "0", *where,
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1] == (
        f"error: {storage} failed ({reason}); make room on its disk, or check that its server "
        "runs. Finished trials are kept; the same command goes on."
    )

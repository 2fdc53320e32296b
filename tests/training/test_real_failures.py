"""A real allocator fails in forward and in backward, and no bit of the outcome differs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bs_optuna.training.limit_environment import LIMIT_ENVIRONMENT


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot limit a CPU's memory")
def test_real_failures_in_forward_and_backward_change_no_bit() -> None:
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("real_failures.py"))],
        env={**os.environ, **LIMIT_ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["failures"].count("forward") >= 5
    assert found["failures"].count("backward") >= 5
    assert found["whole"] >= 1  # the largest limit holds the whole batch: the sweep met the edge

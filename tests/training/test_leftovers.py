"""Two hundred real failures leave nothing behind, and dealing with them imports nothing."""

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
def test_failures_leave_nothing_behind() -> None:
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("real_leftovers.py"))],
        env={**os.environ, **LIMIT_ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["grown"] < 5 * 2**20
    assert found["imported"] == []
    for where in ("forward", "backward", "stepping", "evaluation"):
        assert found["where"][where] >= 3

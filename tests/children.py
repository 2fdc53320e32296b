"""Scripts that are run in a process of their own, started as a memory limit needs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bs_optuna.training.limit_environment import LIMIT_ENVIRONMENT


def run_limited(script: Path) -> Any:
    """What the script printed, read as JSON."""
    run = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, **LIMIT_ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)

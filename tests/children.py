"""Programs that tests run in a process of their own, also one that a memory limit is for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bs_optuna.training.limit_environment import LIMIT_ENVIRONMENT


def run_python(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Python with some arguments, in a folder or in this one, to its end, well or not."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def run_limited(script: Path, *arguments: str) -> Any:
    """What the script printed with some arguments, read as JSON."""
    run = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, **LIMIT_ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)

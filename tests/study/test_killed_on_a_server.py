"""A worker that dies while the study is on a PostgreSQL server, where no file has a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from optuna.trial import TrialState

from bs_optuna.sampling import attributes
from bs_optuna.study import open_study


TASK = Path(__file__).parents[1] / "system" / "dying_task.py"


@pytest.mark.slow
def test_the_killed_trial_goes_on_from_its_checkpoint(postgresql: str, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    storage = f"{postgresql}/postgres"
    run = subprocess.run(
        [
            sys.executable, "-W", "error", "-m", "bs_optuna.tune", str(TASK), "--storage", storage,
            "--study", "killed", "--isolate", "--trials", "1", "--budget", "samples=1280",
            "--batch-size", "32:32", "--final-runs", "0",
        ],
        cwd=tmp_path,
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary),
            "DYING_OF": "SIGKILL", "DYING_AT": "20", "DYING_TIMES": "1",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    killed, again = open_study(storage=storage, name="killed").get_trials()
    assert (killed.state, again.state) == (TrialState.FAIL, TrialState.COMPLETE)
    assert again.params == killed.params
    assert killed.user_attrs[attributes.PRUNE_REASON].startswith("killed by SIGKILL")
    # 20 steps of one microbatch; from step 16 on the other 24 with two.
    assert (tmp_path / "passes.log").read_text().count("\n") == 20 + 2 * 24
    assert not list(temporary.glob("bs_optuna-*"))

"""The command line called from another thread than the main one, as from a notebook's server."""

from __future__ import annotations

from pathlib import Path

import pytest
from children import run_python


IN_A_THREAD = """
import sys, threading
from bs_optuna.tune import main

if __name__ == "__main__":
    ended = []
    thread = threading.Thread(target=lambda: ended.append(main(sys.argv[1:])))
    thread.start()
    thread.join()
    print("ended", ended)
"""


@pytest.mark.slow
def test_workers_are_started_from_there_too(tmp_path: Path) -> None:
    (tmp_path / "thread.py").write_text(IN_A_THREAD)
    run = run_python(
        *("thread.py", "--isolate", "--trials", "1", "--budget", "steps=5", "--final-runs", "0"),
        folder=tmp_path,
    )
    assert "ended [0]" in run.stdout, run.stderr

"""Two real gloo processes that run one case of a script, and what each of them found."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bs_optuna.training.limit_environment import LIMIT_ENVIRONMENT


RANKS = 2
# A collective that the other rank never reaches ends with an error after this.
HANGS = timedelta(seconds=60)


def run_ranks(script: Path, case: str, folder: Path) -> list[Any]:
    """What the case returned on each rank; fails where one fails, or hangs."""
    runs = [
        subprocess.Popen(
            [sys.executable, "-W", "error", str(script), case, str(rank), str(folder)],
            env={**os.environ, **LIMIT_ENVIRONMENT, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        errors = [run.communicate(timeout=500)[1] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0] * RANKS, "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def rank_main(cases: dict[str, Callable[[int], Any]]) -> None:
    """Runs the case named on the command line as one of the ranks."""
    case, rank, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=HANGS
    )
    torch.save(cases[case](rank), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()

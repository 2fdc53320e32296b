"""Two real gloo processes that run one case of a script, and the small network they train."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from collecting import leave_out_of_collections
from failing import FailingAt
from torch import nn

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
    leave_out_of_collections()
    torch.save(cases[case](rank), folder / f"{rank}.pt")
    dist.barrier()
    gc.collect()  # what holds the group keeps gloo's threads
    dist.destroy_process_group()
    os._exit(0)  # those of them that are left now and then abort a process that ends


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "plain": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, foreach=False),
}


def allocate_too_much() -> None:
    """The allocator's own refusal, whatever the machine."""
    torch.empty(2**55)


def network() -> nn.Module:
    torch.default_generator.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(2 * 16, 3),
    )  # fmt: skip


def images(rank: int, n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 + rank)
    return torch.randn(n, 1, 6, 6, generator=generator), torch.randint(3, (n,), generator=generator)


def gradients(model: nn.Module) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


class Recording(FailingAt):
    """Also knows where a part ends that no collective is in."""

    def __init__(self, position: int | None) -> None:
        super().__init__(position)
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace != "profiler":  # which is not counted either
            self.names.append(str(func))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def own(self) -> int:
        """How many operations come before the ranks tell each other how it went."""
        collective = next(i for i, name in enumerate(self.names) if name.startswith("c10d."))
        return max(i for i in range(collective) if self.names[i].startswith("aten.zero_"))

"""How bs_optuna, accelerate and Lightning find a microbatch that fits, under the same real limits.

    python benchmarks/memory.py
    python benchmarks/memory.py --limits 50 200 --systems bs_optuna accelerate --plot memory.png

Every row is a fresh process: one training of a few steps at a wanted batch size, in what memory
the limit leaves. What cannot be imported is skipped (pip install accelerate lightning).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import ragged_gradient
import torch
from torch import nn

from bs_optuna.training.limit_environment import LIMIT_ENVIRONMENT
from bs_optuna.training.limit_environment import is_prepared
from bs_optuna.training.memory_limit import MemoryLimit
from bs_optuna.training.memory_limit import memory_limit
from bs_optuna.training.oom import classify


BATCH, STEPS, SAMPLES = 1024, 3, 8192
CPU = torch.device("cpu")
SYSTEMS = {
    "bs_optuna": None,
    "accelerate": "accelerate",
    "lightning power": "lightning",
    "lightning binsearch": "lightning",
}


class Wide(nn.Sequential):
    """0.75 MB of activations a sample beside 7 MB of parameters; counts the samples it is fed."""

    fed = 0
    failed = 0

    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 65536), nn.ReLU(), nn.Linear(65536, 10))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The logits."""
        # Samples that a prediction is made with are of another type: nothing is computed.
        if self.training and torch.is_grad_enabled() and type(inputs) is torch.Tensor:
            Wide.fed += len(inputs)
        outputs: torch.Tensor = super().forward(inputs)
        return outputs


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SAMPLES, 16, generator=generator), torch.zeros(SAMPLES, dtype=torch.long)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """As bs_optuna makes it, for all."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def train(model: nn.Module, *, microbatch: int, accumulation: int, steps: int = STEPS) -> None:
    """A training loop as a person writes it."""
    inputs, targets = data()
    optimizer = adamw(model)
    for _ in range(steps):
        optimizer.zero_grad()
        for part in range(accumulation):
            here = slice(part * microbatch, (part + 1) * microbatch)
            loss = nn.functional.cross_entropy(model(inputs[here]), targets[here])
            (loss / accumulation).backward()
        optimizer.step()


def limited(limit_bytes: int) -> MemoryLimit:
    """The limit, ready to be imposed."""
    limit = memory_limit(CPU, limit_bytes)
    limit.warm_up(lambda: train(Wide(), microbatch=8, accumulation=2, steps=1))
    limit.start_trial()
    Wide.fed = 0
    return limit


def run_bs_optuna(limit_bytes: int) -> dict[str, Any]:
    """One trial of a study."""
    import optuna

    from bs_optuna.sampling import attributes
    from bs_optuna.training import Budget
    from bs_optuna.training import TrainingObjective
    from bs_optuna.training import TrainingTask

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    inputs, targets = data()
    task = TrainingTask(
        model=Wide,
        train_data=(inputs, targets),
        valid_data=(inputs[:256], targets[:256]),
        loss=nn.functional.cross_entropy,
    )
    objective = TrainingObjective(
        task,
        budget=Budget("steps", STEPS),
        batch_size=(16, BATCH),
        memory_limit=limit_bytes,
        device=CPU,
    )
    study = optuna.create_study()
    study.enqueue_trial({"batch_size": BATCH, "lr": 1e-4})
    Wide.fed = 0  # after the rehearsal, which every row has
    study.optimize(objective, n_trials=1)
    stored = study.trials[0].user_attrs
    return {
        "size": stored[attributes.MICROBATCH_SIZE],
        "failed": stored[attributes.BACKOFFS],
        "batch": stored[attributes.EFFECTIVE_BATCH_SIZE],
        "works": stored[attributes.STEPS] == STEPS,
    }


def run_accelerate(limit_bytes: int) -> dict[str, Any]:
    """Its decorator around a whole training, accumulating as in its own example."""
    from accelerate.utils import find_executable_batch_size

    tried: list[int] = []

    @find_executable_batch_size(starting_batch_size=BATCH)
    def training(batch_size: int) -> int:
        tried.append(batch_size)
        accumulation = max(1, BATCH // batch_size)
        train(Wide(), microbatch=batch_size, accumulation=accumulation)
        return accumulation * batch_size

    with limited(limit_bytes).active():
        batch = training()
    return {"size": tried[-1], "failed": len(tried) - 1, "batch": batch, "works": True}


def run_lightning(limit_bytes: int, mode: str) -> dict[str, Any]:
    """Its callback before a fit with the size it found; it does not accumulate."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import BatchSizeFinder
    from lightning.pytorch.tuner import batch_size_scaling

    class Module(pl.LightningModule):
        batch_size = 2

        def __init__(self) -> None:
            super().__init__()
            self.net = Wide()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            inputs, targets = batch
            return nn.functional.cross_entropy(self.net(inputs), targets)

        def train_dataloader(self) -> Any:
            dataset = torch.utils.data.TensorDataset(*data())
            return torch.utils.data.DataLoader(dataset, batch_size=self.batch_size)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adamw(self)

    recognize = batch_size_scaling.is_oom_error

    def counted(error: BaseException) -> bool:
        Wide.failed += 1
        return bool(recognize(error))

    batch_size_scaling.is_oom_error = counted
    module = Module()
    trainer = pl.Trainer(
        max_steps=STEPS, callbacks=[BatchSizeFinder(mode=mode)], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    works = True
    with limited(limit_bytes).active():
        try:
            trainer.fit(module)
        except RuntimeError as error:
            if classify(error) is None:
                raise
            works = False
    size = module.batch_size
    return {"size": size, "failed": Wide.failed + (not works), "batch": size, "works": works}


def run_truth(limit_bytes: int) -> dict[str, Any]:
    """The largest microbatch that a plain accumulating loop can take, by trying."""

    def fits(size: int) -> bool:
        limit.start_trial()
        try:
            with limit.active():
                train(Wide(), microbatch=size, accumulation=2)
        except RuntimeError as error:
            if classify(error) is None:
                raise
            return False
        return True

    limit = limited(limit_bytes)
    low, high = 0, BATCH
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return {"size": low}


def child(system: str, limit_bytes: int) -> None:
    """Runs one row and prints what it met."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    begin = time.perf_counter()
    if system.startswith("lightning"):
        found = run_lightning(limit_bytes, system.split()[1])
    else:
        rows = {"bs_optuna": run_bs_optuna, "accelerate": run_accelerate, "truth": run_truth}
        found = rows[system](limit_bytes)
    found["seconds"] = time.perf_counter() - begin
    found["fed"] = Wide.fed
    if system != "truth":
        found["error"] = ragged_gradient.error(system)
    print(json.dumps(found))


def measure(system: str, mib: int) -> dict[str, Any]:
    """What a row met, in a fresh process."""
    process = subprocess.run(
        [sys.executable, __file__, "--child", system, "--limits", str(mib)],
        env={**os.environ, **LIMIT_ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        return {"died": (process.stderr.strip().splitlines() or ["no word"])[-1]}
    found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return found


def row(system: str, mib: int, truth: int, found: dict[str, Any]) -> str:
    """A line of the table."""
    name = f"| {mib} | {truth} | {system} |"
    if "died" in found:
        return f"{name} {found['died']:.60} |"
    wasted = max(0, found["fed"] - STEPS * found["batch"])
    kept = "yes" if found["batch"] == BATCH else f"no, {found['batch']}"
    works = "yes" if found["works"] else "no"
    return (
        f"{name} {found['size']} | {found['size'] / truth:.0%} | {found['failed']} | {wasted} | "
        f"{kept} | {found['error']:.1e} | {works} | {found['seconds']:.1f} |"
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limits", type=int, nargs="+", default=[50, 90, 102, 200], help="MiB")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the table too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        assert is_prepared()
        child(arguments.child, arguments.limits[0] * 2**20)
        return
    print(f"torch {torch.__version__}, 1 thread, wanted batch size {BATCH}, {STEPS} steps")
    print("| limit, MiB | true maximum | system | found | of maximum | failed attempts | ", end="")
    print("samples in vain | batch kept | gradient error | trains | seconds |")
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    rows: dict[int, dict[str, dict[str, Any]]] = {}
    for mib in arguments.limits:
        truth = measure("truth", mib)["size"]
        rows[mib] = {}
        for system in arguments.systems:
            needed = SYSTEMS[system]
            if needed is not None and importlib.util.find_spec(needed) is None:
                print(f"| {mib} | {truth} | {system} | skipped: {needed} is not installed |")
                continue
            found = measure(system, mib)
            print(row(system, mib, truth, found), flush=True)
            if "died" not in found:
                rows[mib][system] = {**found, "truth": truth}
    if arguments.plot:
        from memory_figure import draw

        draw(rows, arguments.plot)


if __name__ == "__main__":
    main()

"""How bs_optuna, accelerate and Lightning find a microbatch that fits, under the same real limits.

    python benchmarks/memory.py
    python benchmarks/memory.py --limits 50 200 --systems bs_optuna accelerate --plot memory.png
    python benchmarks/memory.py --device cuda

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
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import memory_systems
import ragged_gradient
import torch
from memory_systems import BATCH
from memory_systems import STEPS
from memory_systems import Wide

from bs_optuna.training.limit_environment import LIMIT_ENVIRONMENT
from bs_optuna.training.limit_environment import is_prepared


SYSTEMS = {
    "bs_optuna": None,
    "accelerate": "accelerate",
    "lightning power": "lightning",
    "lightning binsearch": "lightning",
}
# MiB. On CUDA the workspaces of its libraries, tens of MiB, come out of the same allowance.
LIMITS = {"cpu": [50, 90, 102, 200], "cuda": [150, 250, 400, 700]}


def child(system: str, device: torch.device, limit_bytes: int) -> None:
    """Runs one row and prints what it met."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    begin = time.perf_counter()
    if system.startswith("lightning"):
        found = memory_systems.run_lightning(device, limit_bytes, system.split()[1])
    else:
        found = getattr(memory_systems, f"run_{system}")(device, limit_bytes)
    found["seconds"] = time.perf_counter() - begin
    found["fed"] = Wide.fed
    if system != "truth":
        found["error"] = ragged_gradient.error(system)
    print(json.dumps(found))


def measure(system: str, device: str, mib: int) -> dict[str, Any]:
    """What a row met, in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", system]
    with tempfile.TemporaryDirectory() as folder:  # for what Lightning leaves behind
        process = subprocess.run(
            [*command, "--device", device, "--limits", str(mib)],
            cwd=folder,
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
    parser.add_argument("--device", choices=LIMITS, default="cpu")
    parser.add_argument("--limits", type=int, nargs="+", help="MiB")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the table too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        assert is_prepared()
        child(arguments.child, torch.device(arguments.device), arguments.limits[0] * 2**20)
        return
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device; leave it out for the CPU")
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, 1 thread"
    print(f"torch {torch.__version__}, {name}, wanted batch size {BATCH}, {STEPS} steps")
    print("| limit, MiB | true maximum | system | found | of maximum | failed attempts | ", end="")
    print("samples in vain | batch kept | gradient error | trains | seconds |")
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    rows: dict[int, dict[str, dict[str, Any]]] = {}
    for mib in arguments.limits or LIMITS[device]:
        true = measure("truth", device, mib)
        truth = true.get("size", 0)
        if not truth:
            print(f"| {mib} | {true.get('died', 'not one sample fits')} |")
            continue
        rows[mib] = {}
        for system in arguments.systems:
            needed = SYSTEMS[system]
            if needed is not None and importlib.util.find_spec(needed) is None:
                print(f"| {mib} | {truth} | {system} | skipped: {needed} is not installed |")
                continue
            found = measure(system, device, mib)
            print(row(system, mib, truth, found), flush=True)
            if "died" not in found:
                rows[mib][system] = {**found, "truth": truth}
    if arguments.plot:
        from memory_figure import draw

        draw(rows, arguments.plot)


if __name__ == "__main__":
    main()

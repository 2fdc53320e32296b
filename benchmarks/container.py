"""Trainings in a container that is too small for their batch, and that nobody tells them of.

    python benchmarks/container.py
    python benchmarks/container.py --sizes 700 --systems bs_optuna accelerate

Running out there is no error that could be caught: the kernel kills the process. Every row is a
fresh process in a control group of its own (Linux, as a rule as root): one training of a few steps
at a wanted batch size. What cannot be imported is skipped (pip install accelerate lightning).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import memory_systems
import torch
from control_group import control_group
from memory import SYSTEMS
from memory_systems import BATCH
from memory_systems import STEPS


SIZES = [600, 800, 1000]  # MiB, of which PyTorch and its companions take 300 to 500


def child(system: str) -> None:
    """Runs one row and prints what it met."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if system.startswith("lightning"):
        found = memory_systems.run_lightning(device, None, system.split()[1])
    else:
        found = getattr(memory_systems, f"run_{system}")(device, None)
    print(json.dumps(found))


def measure(system: str, mib: int) -> dict[str, Any]:
    """What a row met; with how many processes were killed."""
    # Lightning leaves a checkpoint behind where it is killed.
    with control_group(mib) as group, tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).resolve()), "--child", system]
        process = group.run(command, folder=Path(folder))
        kills = group.kills
    if process.returncode and not kills:
        raise SystemExit(process.stderr)
    found = {} if process.returncode else json.loads(process.stdout.splitlines()[-1])
    return {**found, "kills": kills}


def row(system: str, mib: int, found: dict[str, Any]) -> str:
    """A line of the table."""
    if "size" not in found:
        return f"| {mib} | {system} | killed | | |"
    kept = "yes" if found["batch"] == BATCH else f"no, {found['batch']}"
    return f"| {mib} | {system} | trained | {found['size']} | {kept} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="MiB")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return
    print(f"torch {torch.__version__}, 1 thread, wanted batch size {BATCH}, {STEPS} steps")
    print("| container, MiB | system | the kernel | microbatch | batch kept |")
    print("|---|---|---|---|---|", flush=True)
    for mib in arguments.sizes:
        for system in arguments.systems:
            needed = SYSTEMS[system]
            if needed is not None and importlib.util.find_spec(needed) is None:
                print(f"| {mib} | {system} | skipped: {needed} is not installed | | |")
                continue
            print(row(system, mib, measure(system, mib)), flush=True)


if __name__ == "__main__":
    main()

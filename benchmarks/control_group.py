"""A control group for a program, as a container has one: the kernel kills at its limit."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from contextlib import suppress
from pathlib import Path

from bs_optuna.training.host_memory import group_folders


MIB = 2**20
# Files that limit memory, and memory with swap, of which there shall be none.
_LIMITS = {
    "memory.max": 1,
    "memory.swap.max": 0,
    "memory.limit_in_bytes": 1,
    "memory.memsw.limit_in_bytes": 1,
}
_JOINED = 'echo $$ > "$0/cgroup.procs" && exec "$@"'


class ControlGroup:
    """A control group; see `control_group`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def run(
        self, command: Sequence[str], *, folder: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A program and what it starts, in the group, to its end."""
        return subprocess.run(
            ["sh", "-c", _JOINED, str(self._folder), *command],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    @property
    def kills(self) -> int:
        """How many processes the kernel has killed for want of memory."""
        for name in ("memory.events", "memory.oom_control"):
            with suppress(OSError):
                lines = (self._folder / name).read_text().splitlines()
                return int(dict(line.split() for line in lines)["oom_kill"])
        raise OSError("the kernel does not count them")


@contextmanager
def control_group(mib: int) -> Iterator[ControlGroup]:
    """A group within this process's own.

    Raises:
        PermissionError: None can be made that counts memory: it takes Linux, and as a rule root.
    """
    folder = _made()
    try:
        for name, value in _LIMITS.items():
            if (folder / name).exists():
                (folder / name).write_text(str(value * mib * MIB))
        yield ControlGroup(folder)
    finally:
        _remove(folder)


def _made() -> Path:
    with suppress(OSError):
        for own, _ in group_folders():
            folder = own / f"bs_optuna_{os.getpid()}"
            with suppress(OSError):
                folder.mkdir()
                if any((folder / name).exists() for name in _LIMITS):
                    return folder
                folder.rmdir()
    raise PermissionError("no control group that counts memory can be made here; try as root")


def _remove(folder: Path) -> None:
    for _ in range(100):  # until the last process is gone for good
        with suppress(OSError):
            folder.rmdir()
            return
        for line in (folder / "cgroup.procs").read_text().splitlines():
            with suppress(ProcessLookupError):
                os.kill(int(line), signal.SIGKILL)
        time.sleep(0.05)

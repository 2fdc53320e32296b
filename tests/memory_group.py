"""Programs in a control group of their own, whose memory the kernel limits by killing them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from pathlib import Path

import pytest

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


class MemoryGroup:
    """A control group; see `memory_group`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def python(self, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
        """Python with some arguments, in a folder, as the first process of the group."""
        return subprocess.run(
            ["sh", "-c", _JOINED, str(self.folder), sys.executable, *arguments],
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
                lines = (self.folder / name).read_text().splitlines()
                return int(dict(line.split() for line in lines)["oom_kill"])
        raise AssertionError("the kernel does not count them")


@contextmanager
def memory_group(mib: int) -> Iterator[MemoryGroup]:
    """A group within this process's own; the test is skipped where none can be made."""
    folder = _made()
    if folder is None:
        pytest.skip("needs control groups that count memory and that this user may make")
    try:
        for name, value in _LIMITS.items():
            if (folder / name).exists():
                (folder / name).write_text(str(value * mib * MIB))
        yield MemoryGroup(folder)
    finally:
        _remove(folder)


def _made() -> Path | None:
    with suppress(OSError):
        for own, _ in group_folders():
            folder = own / f"bs_optuna_{os.getpid()}"
            with suppress(OSError):
                folder.mkdir()
                if any((folder / name).exists() for name in _LIMITS):
                    return folder
                folder.rmdir()
    return None


def _remove(folder: Path) -> None:
    for _ in range(100):  # until the last process is gone for good
        with suppress(OSError):
            folder.rmdir()
            return
        for line in (folder / "cgroup.procs").read_text().splitlines():
            with suppress(ProcessLookupError):
                os.kill(int(line), signal.SIGKILL)
        time.sleep(0.05)

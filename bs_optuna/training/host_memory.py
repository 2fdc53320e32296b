"""What the machine, or the container that this process is in, has of memory for it.

There running out is no error that could be caught: the kernel kills the process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


_PROC = Path("/proc")
_MEMORY = "memory"
# What the files of a control group are called, in version 2 and version 1 of them.
_LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")
_USAGE = ("memory.current", "memory.usage_in_bytes")
# Of memory.stat: pages of files that are given up when memory is short.
_RECLAIMABLE = ("total_inactive_file", "inactive_file")


def free_host_bytes(proc: Path = _PROC) -> int | None:
    """Bytes that this process can still take: of the machine, and of each group that it is in.

    None where the system does not tell (Linux does).

    Args:
        proc: Where the kernel tells of processes.
    """
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    free = [int(available.split()[1]) * 1024]
    free += [group.limit_bytes - group.used_bytes for group in _groups(proc)]
    return max(0, min(free))


def total_host_bytes(proc: Path = _PROC) -> int | None:
    """Bytes that this process may use at most: of the machine, or by the smallest group's limit.

    None where the system does not tell.

    Args:
        proc: Where the kernel tells of processes.
    """
    if not hasattr(os, "sysconf"):
        return None
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *(group.limit_bytes for group in _groups(proc))])


@dataclass(frozen=True)
class _Group:
    """A control group with a limit, by which containers and batch systems divide a machine."""

    limit_bytes: int
    used_bytes: int

    @classmethod
    def at(cls, folder: Path) -> _Group | None:
        """The group of a folder; None if nothing limits it."""
        limits = [limit for name in _LIMITS if (limit := _number(folder / name)) is not None]
        used = [usage for name in _USAGE if (usage := _number(folder / name)) is not None]
        if not limits or not used:
            return None
        return cls(min(limits), used[0] - _reclaimable(folder))


def _groups(proc: Path) -> Iterator[_Group]:
    """The groups of this process that have a limit, and those around them."""
    with suppress(OSError, ValueError):  # no such files, or none of this form
        for folder, top in group_folders(proc):
            for each in (folder, *folder.parents):
                if (group := _Group.at(each)) is not None:
                    yield group
                if each == top:
                    break


def group_folders(proc: Path = _PROC) -> Iterator[tuple[Path, Path]]:
    """For each hierarchy of groups that may count memory: this process's folder, and the top.

    Raises:
        OSError: The system has none.
    """
    paths = {}
    for line in _lines(proc / "self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers or _MEMORY in controllers.split(","):
            paths["cgroup" if controllers else "cgroup2"] = path
    for line in _lines(proc / "self/mountinfo"):
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        root, top = before.split(" ")[3:5]
        if kind not in paths or (kind == "cgroup" and _MEMORY not in options.split(",")):
            continue
        # In a container the path may begin with its own group, which is all that is mounted.
        path = paths[kind].removeprefix("" if root == "/" else root).strip("/")
        folder = Path(top, path)
        yield (folder if folder.is_dir() else Path(top)), Path(top)


def _lines(file: Path) -> list[str]:
    return file.read_text(errors="surrogateescape").splitlines()  # of names that are no UTF-8


def _number(file: Path) -> int | None:
    """What a file says; None if there is none, or it says that there is no limit."""
    with suppress(OSError, ValueError):  # "max"
        return int(file.read_text())
    return None


def _reclaimable(folder: Path) -> int:
    with suppress(OSError):
        lines = (folder / "memory.stat").read_text().splitlines()
        found = dict(line.split(" ", 1) for line in lines)
        return next((int(found[name]) for name in _RECLAIMABLE if name in found), 0)
    return 0

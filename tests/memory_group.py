"""Programs in a control group of their own, whose memory the kernel limits by killing them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from control_group import ControlGroup as ControlGroup  # for annotations
from control_group import control_group


@contextmanager
def memory_group(mib: int) -> Iterator[ControlGroup]:
    """A group; the test is skipped where none can be made."""
    try:
        made = control_group(mib)
        group = made.__enter__()
    except PermissionError as error:
        pytest.skip(str(error))
    try:
        yield group
    finally:
        made.__exit__(None, None, None)


def python(group: ControlGroup, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Python with some arguments, in a folder, as the first process of the group."""
    return group.run([sys.executable, *arguments], folder=folder)

"""Programs in a control group of their own, whose memory the kernel limits by killing them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from contextlib import contextmanager
from pathlib import Path

import pytest
from control_group import ControlGroup
from control_group import control_group


@contextmanager
def memory_group(mib: int) -> Iterator[ControlGroup]:
    """A group; the test is skipped where none can be made."""
    with ExitStack() as stack:
        try:
            group = stack.enter_context(control_group(mib))
        except PermissionError as error:
            pytest.skip(str(error))
        yield group


def python(group: ControlGroup, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Python with some arguments, in a folder, as the first process of the group."""
    return group.run([sys.executable, *arguments], folder=folder)

"""What is committed is source: nothing large, and nothing that a program has left behind."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
LARGEST_BYTES = 300_000


def test_no_large_file_is_committed() -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a clone")
    listed = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip(listed.stderr)
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    large = [f.name for f in files if f.exists() and f.stat().st_size > LARGEST_BYTES]
    assert not large

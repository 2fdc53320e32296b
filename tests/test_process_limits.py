"""Limits of a shell that leave no room to begin: one line, not a traceback or a hang."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from bs_optuna.process_limits import refused


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="others count memory otherwise")


@pytest.mark.parametrize(
    ("option", "kib", "line"),
    [
        ("-v", 200_000, "ulimit -v is 200000, of KiB; PyTorch takes more than 786432: raise it."),
        ("-d", 100_000, "ulimit -d is 100000, of KiB; PyTorch takes more than 131072: raise it."),
    ],
)
def test_a_limit_that_is_too_low_is_named(option: str, kib: int, line: str, tmp_path: Path) -> None:
    command = f"ulimit {option} {kib}; exec {sys.executable} -m bs_optuna.tune digits --trials 1"
    run = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 2, run.stderr
    assert f"error: {line}" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "MemoryError"),
        (ImportError("libtorch_cpu.so: failed to map segment"), "libtorch_cpu.so: failed to map"),
        (SystemError("error return without exception set"), "error return without exception set"),
        (ImportError("no module named torch"), None),
    ],
)
def test_what_fails_while_a_limit_is_set_is_put_down_to_it(
    error: Exception, reason: str | None
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (2**30, hard))
    try:
        found = refused(error)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    if reason is None:
        assert found is None
    else:
        assert f"ulimit -d is 1048576, of KiB; too little to begin ({reason}" in str(found)


def test_a_limit_that_is_ample_is_not_blamed() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (2**36, hard))
    try:
        assert refused(MemoryError("Unable to allocate 728. TiB")) is None
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def test_without_a_limit_memory_is_not_blamed_on_one() -> None:
    assert refused(MemoryError()) is None

"""The environment in which a memory limit on a CPU is repeatable; set it before PyTorch loads.

Importing this module loads neither PyTorch nor NumPy, so that a program can look first and start
itself anew:

    if not is_prepared():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]],
                  os.environ | LIMIT_ENVIRONMENT)
"""

from __future__ import annotations

import os
from pathlib import Path


# Less would cost more in whole pages; the time steps of an LSTM are often less than 64 KiB.
MAPPED_BYTES = 16 * 2**10
LIMIT_ENVIRONMENT: dict[str, str] = {
    # Every tensor of this size or more is mapped on its own and given back when it is freed; glibc
    # otherwise raises this threshold as it goes and keeps what was freed in its heap, so that a
    # size that fitted once fails later.
    "MALLOC_MMAP_THRESHOLD_": str(MAPPED_BYTES),
    # One heap instead of one per thread, each of which would keep its own freed blocks.
    "MALLOC_ARENA_MAX": "1",
    # MKL keeps the buffers of its matrix products for the life of a thread otherwise.
    "MKL_DISABLE_FAST_MM": "1",
}


def is_prepared() -> bool:
    """Says whether this process was started with all of `LIMIT_ENVIRONMENT`.

    The C library reads it once, at the start; where the system tells what that was (Linux), a
    later change of `os.environ` does not count.
    """
    return all(_initial_environment().get(k) == v for k, v in LIMIT_ENVIRONMENT.items())


def _initial_environment() -> dict[str, str]:
    try:
        block = Path("/proc/self/environ").read_bytes()
    except OSError:
        return dict(os.environ)
    entries = (entry.partition(b"=") for entry in block.split(b"\0"))
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in entries}

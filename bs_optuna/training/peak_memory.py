"""The most memory that a stretch of training took beyond what was there before it."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import torch

from bs_optuna.training.process_memory import process_memory


class PeakMemory:
    """Measures from `start()` to `bytes()` at no cost in between.

    On CUDA and XPU it is what PyTorch's allocator took from the device, in segments of which a part
    is never used: it is these that a limit counts, not the bytes of tensors. On a Linux CPU the
    kernel keeps the peak of the resident set; what counts is its growth, without the pages of
    program files. That is what the process took from the machine, allocator and temporary buffers
    included, not the sum of its tensors: a training of 30 MB or more reads 2 to 16 % above
    PyTorch's profiler in a process started with `LIMIT_ENVIRONMENT`, and up to twice as much in an
    ordinary one, where glibc keeps freed blocks. Elsewhere nothing cheap is known, and nothing is
    claimed.

    Args:
        device: The device of the training.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._counts = device.type in ("cuda", "xpu")
        self._start: int | None = None

    def start(self) -> None:
        """Forgets earlier peaks; takes some milliseconds, and more after much garbage."""
        self._start = None
        if self._counts:
            accelerator = torch.get_device_module(self._device)
            accelerator.init()
            gc.collect()  # what the trial before left in cycles
            accelerator.empty_cache()
            accelerator.reset_peak_memory_stats(self._device)
            self._start = accelerator.memory_reserved(self._device)
        elif self._device.type == "cpu" and sys.platform == "linux":
            self._start = _start_resident_peak()

    def bytes(self) -> int | None:
        """The growth since `start()` in bytes, or None where it cannot be measured."""
        if self._start is None:
            return None
        if self._counts:
            accelerator = torch.get_device_module(self._device)
            return int(accelerator.max_memory_reserved(self._device)) - self._start
        now = process_memory("VmHWM", "RssFile", "RssShmem")
        # Program files are loaded page by page as functions are first called, and stay.
        return max(0, now["VmHWM"] - now["RssFile"] - now["RssShmem"] - self._start)


def _start_resident_peak() -> int | None:
    """Resets the kernel's peak; returns the bytes resident now, None where that is impossible."""
    gc.collect(1)  # what the trial before left in cycles; all generations would take a second
    try:
        # Blocks that were freed but stay resident would be used again without any growth.
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return None  # another C library than glibc
    try:
        # 5 resets the peak of the resident set (proc_pid_clear_refs(5)).
        Path("/proc/self/clear_refs").write_text("5")
        return process_memory("RssAnon")["RssAnon"]
    except (OSError, KeyError):
        return None

"""A smaller device: lets a training run out of memory earlier than the machine would.

On CUDA and MPS PyTorch's own allocator refuses; on a Linux CPU the kernel does, see
`LinuxCpuLimit`.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from bs_optuna.errors import ConfigError
from bs_optuna.training.limit import MemoryLimit
from bs_optuna.training.limit import NoLimit
from bs_optuna.training.limit import check_limit
from bs_optuna.training.limit import mebibytes
from bs_optuna.training.linux_cpu_limit import LinuxCpuLimit
from bs_optuna.training.reentrant import Reentrant


# PyTorch's default; MPS has no way to ask what is in force.
_MPS_DEFAULT_FRACTION = "1.7"


def memory_limit(device: torch.device, limit_bytes: int | None) -> MemoryLimit:
    """Makes the limit that a device can enforce.

    Args:
        device: Where the training runs.
        limit_bytes: Bytes the training may use on it; None for no limit.

    Returns:
        A limit that is not yet in force.

    Raises:
        ConfigError: The limit is not positive, exceeds the device, or cannot be enforced there.
    """
    if limit_bytes is None:
        return NoLimit()
    if device.type == "cuda":
        return CudaLimit(device, limit_bytes=limit_bytes)
    if device.type == "mps":
        return MpsLimit(limit_bytes)
    if device.type == "cpu" and sys.platform == "linux":
        return LinuxCpuLimit(limit_bytes)
    raise ConfigError(
        f"memory limit of {mebibytes(limit_bytes)} cannot be enforced on device '{device}' on "
        f"{sys.platform}; leave the limit out, or train on CUDA, MPS or a Linux CPU"
    )


class CudaLimit(MemoryLimit):
    """A fraction of a CUDA device, enforced by PyTorch's allocator.

    Args:
        device: The CUDA device.
        limit_bytes: Bytes that PyTorch may reserve on it.

    Raises:
        ConfigError: The limit is not positive or exceeds the device's memory.
    """

    def __init__(self, device: torch.device, *, limit_bytes: int) -> None:
        total = torch.cuda.get_device_properties(device).total_memory
        check_limit(limit_bytes, total, "the device has")
        # The functions for the fraction take no device without a number.
        self._device = torch.cuda.current_device() if device.index is None else device.index
        self._limit_bytes = limit_bytes
        self._fraction = limit_bytes / total
        self._outer = 1.0
        self._scope: Reentrant = Reentrant(impose=self._impose, lift=self._lift)

    @property
    def limit_bytes(self) -> int:
        """Bytes that PyTorch may reserve on the device."""
        return self._limit_bytes

    def warm_up(self, step: Callable[[], object]) -> None:
        """Runs the step: cuBLAS keeps workspaces of its first calls, which count from then on.

        They are tens of MiB, and what is predicted to fit must leave room for them.
        """
        step()

    def start_trial(self) -> None:
        """Gives cached blocks back, which would count although nothing uses them."""
        gc.collect()
        torch.cuda.empty_cache()

    def active(self) -> AbstractContextManager[None]:
        """A context in which the allocator refuses more than the limit."""
        return self._scope

    def _impose(self) -> None:
        self._outer = torch.cuda.get_per_process_memory_fraction(self._device)
        torch.cuda.set_per_process_memory_fraction(min(self._fraction, self._outer), self._device)

    def _lift(self) -> None:
        torch.cuda.set_per_process_memory_fraction(self._outer, self._device)


class MpsLimit(MemoryLimit):
    """A fraction of Apple's GPU, enforced by PyTorch's allocator.

    Args:
        limit_bytes: Bytes that PyTorch may reserve.

    Raises:
        ConfigError: The limit is not positive or exceeds what Metal recommends as the maximum.
    """

    def __init__(self, limit_bytes: int) -> None:
        total = torch.mps.recommended_max_memory()
        check_limit(limit_bytes, total, "Metal recommends at most")
        self._limit_bytes = limit_bytes
        self._fraction = limit_bytes / total
        self._scope: Reentrant = Reentrant(impose=self._impose, lift=self._lift)

    @property
    def limit_bytes(self) -> int:
        """Bytes that PyTorch may reserve."""
        return self._limit_bytes

    def start_trial(self) -> None:
        """Gives cached blocks back, which would count although nothing uses them."""
        gc.collect()
        torch.mps.empty_cache()

    def active(self) -> AbstractContextManager[None]:
        """A context in which the allocator refuses more than the limit."""
        return self._scope

    def _impose(self) -> None:
        torch.mps.set_per_process_memory_fraction(self._fraction)

    def _lift(self) -> None:
        outer = os.environ.get("PYTORCH_MPS_HIGH_WATERMARK_RATIO", _MPS_DEFAULT_FRACTION)
        torch.mps.set_per_process_memory_fraction(float(outer))

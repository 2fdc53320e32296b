"""A smaller device: lets a training run out of memory earlier than the machine would.

On CUDA and MPS PyTorch's own allocator refuses. On a Linux CPU the kernel refuses: the soft limit
on the data segment (RLIMIT_DATA) is lowered around each step to what the process used when the
trial began, plus the limit, and PyTorch's allocator fails for real.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import warnings
from abc import ABC
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextlib import nullcontext

import torch

from bs_optuna.errors import ConfigError
from bs_optuna.training.limit_environment import LIMIT_ENVIRONMENT
from bs_optuna.training.limit_environment import is_prepared
from bs_optuna.training.process_memory import process_memory
from bs_optuna.training.reentrant import Reentrant


if sys.platform == "linux":
    import resource


_MIB = 2**20
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
        f"memory limit of {_mib(limit_bytes)} cannot be enforced on device '{device}' on "
        f"{sys.platform}; leave the limit out, or train on CUDA, MPS or a Linux CPU"
    )


class MemoryLimit(ABC):
    """What the training may use of a device; for one training at a time in a process."""

    _scope: Reentrant | None = None

    @property
    @abstractmethod
    def limit_bytes(self) -> int | None:
        """Bytes the training may use, or None for no limit."""

    @abstractmethod
    def active(self) -> AbstractContextManager[None]:
        """A context in which the limit is in force; the limit ends with the outermost one."""

    def lifted(self) -> AbstractContextManager[None]:
        """A context inside of ``active()`` for what is no training and must not run short."""
        return nullcontext() if self._scope is None else self._scope.lifted()

    def warm_up(self, step: Callable[[], object]) -> None:
        """Runs a small but full step before any limit is in force, where the device needs it.

        Args:
            step: Forward, backward and optimizer step on a model that is thrown away.
        """
        del step

    def start_trial(self) -> None:  # noqa: B027 - nothing to do on a device that counts for itself
        """Begins to count: what the process holds now is free. Call it before building a model."""


class NoLimit(MemoryLimit):
    """The device as it is."""

    @property
    def limit_bytes(self) -> None:
        """None: there is no limit."""

    def active(self) -> AbstractContextManager[None]:
        """A context that changes nothing."""
        return nullcontext()


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
        _check(limit_bytes, total, "the device has")
        self._device = device
        self._limit_bytes = limit_bytes
        self._fraction = limit_bytes / total
        self._outer = 1.0
        self._scope: Reentrant = Reentrant(impose=self._impose, lift=self._lift)

    @property
    def limit_bytes(self) -> int:
        """Bytes that PyTorch may reserve on the device."""
        return self._limit_bytes

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
        _check(limit_bytes, total, "Metal recommends at most")
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


class LinuxCpuLimit(MemoryLimit):
    """The soft limit on the data segment of this process, lowered around each step.

    While it is in force oneDNN and NNPACK are off: a oneDNN primitive that failed once goes on
    failing in that thread for good, and NNPACK keeps its largest workspace for the life of the
    thread, so that sizes would shift from trial to trial. That makes convolutions slower: never
    take timings under a limit. What runs outside the limit, such as an evaluation, may leave a few
    MiB of oneDNN's code behind, which then count; so run all of a trial inside.

    Args:
        limit_bytes: Bytes that the process may map beyond what it had when the trial began.

    Raises:
        ConfigError: The limit is not positive or exceeds the machine's memory.
    """

    # Per thread, the size of the OpenMP team that has run. Memory refused in a first operation
    # kills the process: starting a thread and glibc's thread-local storage know no failure.
    _warm = threading.local()

    def __init__(self, limit_bytes: int) -> None:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        _check(limit_bytes, total, "the machine has")
        if not is_prepared():
            settings = " ".join(f"{name}={value}" for name, value in LIMIT_ENVIRONMENT.items())
            warnings.warn(
                "The memory limit is real but the sizes that fit are not repeatable in this "
                f"process; start it with {settings} in the environment.",
                RuntimeWarning,
                stacklevel=3,
            )
        self._limit_bytes = limit_bytes
        self._outer = resource.getrlimit(resource.RLIMIT_DATA)
        self._inner: tuple[int, int] | None = None
        self._libraries = _Libraries()
        self._scope: Reentrant = Reentrant(impose=self._impose, lift=self._lift)

    @property
    def limit_bytes(self) -> int:
        """Bytes that the process may map beyond what it had when the trial began."""
        return self._limit_bytes

    def warm_up(self, step: Callable[[], object]) -> None:
        """Runs the step unless this thread has run one; no limit may come before it."""
        if self._scope.depth:
            raise RuntimeError("warm_up inside active(): the limit is in force; call it before")
        if self._is_warm():
            return
        libraries = _Libraries()
        libraries.turn_off()
        try:
            step()
        finally:
            libraries.restore()
        self._warm.team = torch.get_num_threads()

    def start_trial(self) -> None:
        """Takes what the process has mapped now as the baseline that the limit is added to."""
        if self._scope.depth:
            raise RuntimeError("start_trial inside active(): the limit is in force; call it before")
        gc.collect()
        self._outer = resource.getrlimit(resource.RLIMIT_DATA)
        soft, hard = self._outer
        wanted = process_memory("VmData")["VmData"] + self._limit_bytes
        self._inner = (wanted if soft == resource.RLIM_INFINITY else min(wanted, soft), hard)

    def active(self) -> AbstractContextManager[None]:
        """A context in which the kernel refuses more than the limit.

        Raises:
            RuntimeError: `warm_up` or `start_trial` was left out.
        """
        if self._inner is None or not self._is_warm():
            raise RuntimeError(
                "memory limit in force before warm_up() in this thread and start_trial(); "
                "call both first, a process that fails in its first operation is killed"
            )
        return self._scope

    def _is_warm(self) -> bool:
        return bool(getattr(self._warm, "team", 0) >= torch.get_num_threads())

    def _impose(self) -> None:
        assert self._inner is not None
        self._libraries.turn_off()
        resource.setrlimit(resource.RLIMIT_DATA, self._inner)

    def _lift(self) -> None:
        resource.setrlimit(resource.RLIMIT_DATA, self._outer)  # first: it needs no memory
        self._libraries.restore()


class _Libraries:
    """Switches oneDNN and NNPACK off and back to what they were."""

    def __init__(self) -> None:
        self._onednn: tuple[object, ...] = ()
        self._nnpack: tuple[bool, ...] = ()

    def turn_off(self) -> None:
        self._onednn = torch.backends.mkldnn.set_flags(False)
        self._nnpack = torch.backends.nnpack.set_flags(False)

    def restore(self) -> None:
        torch.backends.mkldnn.set_flags(*self._onednn)
        torch.backends.nnpack.set_flags(*self._nnpack)


def _check(limit_bytes: int, total: int, who: str) -> None:
    if not 0 < limit_bytes <= total:
        raise ConfigError(
            f"memory limit of {_mib(limit_bytes)} is out of bounds: {who} {_mib(total)}; "
            "choose a limit above 0 and not above that"
        )


def _mib(size: int) -> str:
    return f"{size / _MIB:,.0f} MiB"

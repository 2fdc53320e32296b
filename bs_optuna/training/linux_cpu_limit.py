"""A limit on memory for a Linux CPU: the soft limit on the data segment of the process.

It is lowered around each step to what the process used when the trial began, plus the limit, and
PyTorch's allocator fails for real.
"""

from __future__ import annotations

import gc
import sys
import threading
import warnings
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextlib import contextmanager

import torch

from bs_optuna.training.host_memory import total_host_bytes
from bs_optuna.training.limit import MemoryLimit
from bs_optuna.training.limit import check_limit
from bs_optuna.training.limit_environment import LIMIT_ENVIRONMENT
from bs_optuna.training.limit_environment import is_prepared
from bs_optuna.training.process_memory import process_memory
from bs_optuna.training.reentrant import Reentrant


if sys.platform == "linux":
    import resource


class LinuxCpuLimit(MemoryLimit):
    """The soft limit on the data segment of this process, lowered around each step.

    While it is in force oneDNN and NNPACK are off: a oneDNN primitive that failed once goes on
    failing in that thread for good, and NNPACK keeps its largest workspace for the life of the
    thread, so that sizes would shift from trial to trial. So are fused transformer layers, which
    evaluate in one operation and take more than twice as much. That makes all of these slower:
    never take timings under a limit. What runs outside the limit, such as an evaluation, may leave
    a few MiB of oneDNN's code behind, which then count; so run all of a trial inside.

    Args:
        limit_bytes: Bytes that the process may map beyond what it had when the trial began.

    Raises:
        ConfigError: The limit is not positive or exceeds the memory of the machine or container.
    """

    # Per thread, the size of the OpenMP team that has run. Memory refused in a first operation
    # kills the process: starting a thread and glibc's thread-local storage know no failure.
    _warm = threading.local()

    def __init__(self, limit_bytes: int) -> None:
        total = total_host_bytes()
        check_limit(limit_bytes, total or limit_bytes, "the machine or container has")
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


@contextmanager
def soft_limit_lifted() -> Iterator[None]:
    """A context for the little that has to succeed although a soft limit is reached, or passed."""
    if sys.platform != "linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


class _Libraries:
    """Switches oneDNN, NNPACK and fused transformer layers off and back to what they were."""

    def __init__(self) -> None:
        self._onednn: tuple[object, ...] = ()
        self._nnpack: tuple[bool, ...] = ()
        self._fused_layers = True

    def turn_off(self) -> None:
        self._onednn = torch.backends.mkldnn.set_flags(False)
        self._nnpack = torch.backends.nnpack.set_flags(False)
        self._fused_layers = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)

    def restore(self) -> None:
        torch.backends.mkldnn.set_flags(*self._onednn)
        torch.backends.nnpack.set_flags(*self._nnpack)
        torch.backends.mha.set_fastpath_enabled(self._fused_layers)

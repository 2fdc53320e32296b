"""What every limit on memory can do, and having none."""

from __future__ import annotations

from abc import ABC
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextlib import nullcontext

from bs_optuna.errors import ConfigError
from bs_optuna.training.reentrant import Reentrant


_MIB = 2**20


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


def check_limit(limit_bytes: int, total: int, who: str) -> None:
    """Refuses a limit that no device of this size can enforce.

    Args:
        limit_bytes: Bytes that the training shall use.
        total: Bytes that there are.
        who: Whose they are, as "the device has".

    Raises:
        ConfigError: The limit is not above 0 and at most ``total``.
    """
    if not 0 < limit_bytes <= total:
        raise ConfigError(
            f"memory limit of {mebibytes(limit_bytes)} is out of bounds: {who} {mebibytes(total)}; "
            "choose a limit above 0 and not above that"
        )


def mebibytes(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / _MIB:,.0f} MiB"

"""A context manager that can be entered again inside itself."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType


class Reentrant:
    """Imposes at the outermost entry, lifts at the outermost exit; can be entered again inside.

    Leaving needs no memory before `lift` is called, so that it can end a shortage of memory.

    Args:
        impose: Called on the outermost entry; if it raises, nothing was entered.
        lift: Called on the outermost exit, whatever is raised inside.

    Attributes:
        depth: How many entries are open.
    """

    def __init__(self, *, impose: Callable[[], None], lift: Callable[[], None]) -> None:
        self.depth = 0
        self._impose = impose
        self._lift = lift

    def __enter__(self) -> None:
        if self.depth == 0:
            self._impose()
        self.depth += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.depth -= 1
        if self.depth == 0:
            self._lift()

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """A context inside in which nothing is imposed; outside of all entries it does nothing."""
        if self.depth == 0:
            yield
            return
        self._lift()
        try:
            yield
        finally:
            self._impose()

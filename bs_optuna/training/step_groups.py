"""Which groups of parameters an optimizer has stepped before it failed, so that none is twice."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


Group = dict[str, Any]


class StepGroups:
    """The groups of one step, which are stepped one after the other, each as a whole or not at all.

    Args:
        optimizer: Goes through its ``param_groups`` once in a step, as PyTorch's own do.

    Attributes:
        done: Those that have been stepped.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.done: list[Group] = []

    @contextmanager
    def remaining(self) -> Iterator[None]:
        """A context in which the optimizer steps what is not done yet, and that is noted."""
        groups = self._optimizer.param_groups
        done = {id(group) for group in self.done}
        left = _Noting((group for group in groups if id(group) not in done), self.done)
        # The last of the hooks: others may go through the groups too.
        handle = self._optimizer.register_step_pre_hook(left.begin)
        self._optimizer.param_groups = left
        try:
            yield
        finally:
            self._optimizer.param_groups = groups
            handle.remove()


class _Noting(list[Group]):
    """Groups of which the next iteration notes the ones that it leaves behind."""

    def __init__(self, groups: Iterable[Group], done: list[Group]) -> None:
        super().__init__(groups)
        self._done = done
        self._begins = False

    def begin(self, *_: object) -> None:
        self._begins = True

    def __iter__(self) -> Iterator[Group]:
        groups = super().__iter__()
        if not self._begins:
            return groups
        self._begins = False
        return self._noted(groups)

    def _noted(self, groups: Iterator[Group]) -> Iterator[Group]:
        for group in groups:
            yield group
            self._done.append(group)  # not reached where stepping it raised

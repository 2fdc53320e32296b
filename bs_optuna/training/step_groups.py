"""Which groups of parameters an optimizer has stepped before it failed, so that none is twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


Group = dict[str, Any]


class StepGroups:
    """The groups of one step, which are stepped one after the other, each as a whole or not at all.

    Args:
        optimizer: Goes through its ``param_groups`` once in a step, as PyTorch's own do.
        fuse: Whether it finds ``fused`` set meanwhile, which nobody else sees.
        noted: Whether to note what is done; not where all is undone if one group fails.

    Attributes:
        done: Those that have been stepped, as far as they are noted.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, fuse: bool, noted: bool) -> None:
        self._optimizer = optimizer
        self._fuse = fuse
        self._noted = noted
        self.done: list[Group] = []

    @contextmanager
    def remaining(self) -> Iterator[None]:
        """A context in which the optimizer steps what is not done yet, and that is noted."""
        groups = self._optimizer.param_groups
        noting = _Noting(groups, self.done if self._noted else [], fuse=self._fuse)
        # The last of the hooks: others may go through the groups too.
        handle = self._optimizer.register_step_pre_hook(noting.begin)
        self._optimizer.param_groups = noting
        try:
            yield
        finally:
            self._optimizer.param_groups = groups
            handle.remove()


class _Noting(list[Group]):
    """All groups; the step goes through those that are left, and each that it leaves is noted."""

    def __init__(self, groups: list[Group], done: list[Group], *, fuse: bool) -> None:
        super().__init__(groups)
        self._done = done
        self._fuse = fuse
        self._begins = False

    def begin(self, *_: object) -> None:
        self._begins = True

    def __iter__(self) -> Iterator[Group]:
        if not self._begins:
            return super().__iter__()
        self._begins = False
        return self._noted()

    def _noted(self) -> Iterator[Group]:
        for group in super().__iter__():
            if any(group is other for other in self._done):
                continue
            try:
                yield {**group, "fused": True} if self._fuse else group
            except GeneratorExit:  # PyTorch looks at the first ones, before it steps any
                self._begins = True
                raise
            self._done.append(group)  # not reached where stepping it raised

"""A device whose allocator fails at a chosen operation, also where no real limit reaches."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode  # no public way to see every operation


class FailingAt(TorchDispatchMode):
    """Raises torch.OutOfMemoryError instead of operation number ``position``, once."""

    def __init__(self, position: int | None) -> None:
        super().__init__()
        self.position = position
        self.operations = 0
        self.failures = 0
        self.marks: list[int] = []  # a test's own: how many operations there were at some moment

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "profiler":  # a mark in a trace, which no device takes part in
            return func(*args, **(kwargs or {}))
        number = self.operations
        self.operations += 1
        if number == self.position:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return func(*args, **(kwargs or {}))

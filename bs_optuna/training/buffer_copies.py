"""Copies of a model's buffers, which a pass changes: what it was before can be put back."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn


# A buffer of this size or more is worth a look whether it needs to be copied in each pass: tables,
# masks and quantized weights do not change.
LARGE_BYTES = 2**20

_Key = tuple[int, str]


@dataclass(slots=True)
class SavedBuffer:
    """A buffer as it was before an attempt.

    Attributes:
        module: Whose buffer it is.
        name: Its name there.
        buffer: The tensor itself.
        shape: Its shape then.
        persistent: Whether it is part of the module's state.
        copy: Of its values; None of one that passes do not change.
        version: Its counter of changes in place then; 0 with a copy.
    """

    module: nn.Module
    name: str
    buffer: torch.Tensor
    shape: torch.Size
    persistent: bool
    copy: torch.Tensor | None
    version: int

    @property
    def key(self) -> _Key:
        """What it is known by."""
        return id(self.module), self.name

    @property
    def is_large(self) -> bool:
        """Whether copying it takes time and memory."""
        strided = self.buffer.layout == torch.strided and not self.buffer.is_nested
        return strided and self.buffer.nbytes >= LARGE_BYTES

    def has_changed(self) -> bool:
        """Whether a pass has changed it, as far as its copy or that count tells."""
        if self.module._buffers.get(self.name) is not self.buffer:
            return True
        if self.copy is None:
            return self.buffer._version != self.version
        return not _same(distinct(self.buffer), self.copy)

    def restore(self) -> None:
        """Puts values and tensor back.

        Raises:
            RuntimeError: It has changed for the first time, and there is no copy.
        """
        if self.copy is not None:
            self._put_back(self.copy)
        elif self.buffer._version != self.version:
            raise RuntimeError(
                f"Buffer {self.name!r} of a {type(self.module).__name__} changed for the first "
                "time in a pass that ran out of memory, and could not be put back: after earlier "
                "passes, which left it alone, it was not copied any more. Load a checkpoint."
            )
        if self.name not in self.module._buffers:  # forward has deleted it
            if hasattr(self.module, self.name):
                delattr(self.module, self.name)
            self.module.register_buffer(self.name, self.buffer, persistent=self.persistent)
        elif self.module._buffers[self.name] is not self.buffer:  # or put another in its place
            setattr(self.module, self.name, self.buffer)

    def _put_back(self, copy: torch.Tensor) -> None:
        inference = torch.inference_mode() if self.buffer.is_inference() else nullcontext()
        with inference:
            if self.buffer.shape != self.shape:
                self.buffer.resize_(self.shape)
            target = distinct(self.buffer)
            # A file that is mapped for reading cannot be written to, and ends the process.
            if not (target.is_cpu and _same(target, copy)):
                target.copy_(copy)


class BufferCopies:
    """Memory for the copies of some modules' buffers, from pass to pass.

    A large buffer is not copied any more once a pass has left it alone. Then the count of
    operations in place tells if one does change it, which writing through ``.data``, NumPy or
    DLPack escapes.

    Args:
        modules: Every module with buffers of interest, those within others too.
        all_copied: Whether to copy all in each pass. Of several ranks none may be left alone by
            an error of another one that could not undo its pass.
    """

    def __init__(self, modules: Sequence[nn.Module], *, all_copied: bool = False) -> None:
        self._modules = modules
        self._all_copied = all_copied
        self._copies: dict[_Key, torch.Tensor] = {}
        self._constant: dict[_Key, torch.Tensor] = {}
        self._changing: set[_Key] = set()

    def save(self) -> list[SavedBuffer]:
        """All buffers as they are now."""
        return [self._saved(module, name, buffer) for module, name, buffer in self.named()]

    def settle(self, saved: Sequence[SavedBuffer]) -> None:
        """Looks what a whole pass has changed, of those that take long to copy."""
        for buffer in () if self._all_copied else saved:
            if not buffer.is_large or buffer.key in self._changing:
                continue
            self._constant.pop(buffer.key, None)
            if buffer.buffer.is_inference() or buffer.has_changed():
                self._changing.add(buffer.key)
            else:
                self._constant[buffer.key] = buffer.buffer
                self._copies.pop(buffer.key, None)

    def named(self) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
        """Each buffer after its module and name."""
        for module in self._modules:
            # What is public here takes ten times as long, in each step.
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    yield module, name, buffer

    def _saved(self, module: nn.Module, name: str, buffer: torch.Tensor) -> SavedBuffer:
        key = (id(module), name)
        persistent = name not in module._non_persistent_buffers_set
        if self._constant.get(key) is buffer:
            version = buffer._version
            return SavedBuffer(module, name, buffer, buffer.shape, persistent, None, version)
        copy, values = self._copies.get(key), distinct(buffer.detach())
        if copy is None or copy.shape != values.shape or copy.dtype != values.dtype:
            copy = self._copies[key] = torch.empty_like(values)
        copy.copy_(values)
        return SavedBuffer(module, name, buffer, buffer.shape, persistent, copy, 0)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are known to hold the same bytes; numbers that are none are equal then.

    It takes no memory on a CPU.
    """
    try:
        if one.is_contiguous() and other.is_contiguous() and one.dtype == other.dtype:
            one, other = (t.reshape(-1).view(torch.uint8) for t in (one, other))
        return torch.equal(one, other)
    except (RuntimeError, MemoryError):  # of a kind that is not compared
        return False


def distinct(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or of an expanded one a view in which no two elements are the same memory."""
    if tensor.layout != torch.strided or tensor.is_nested or 0 not in tensor.stride():
        return tensor
    return tensor[tuple(slice(None if stride else 1) for stride in tensor.stride())]

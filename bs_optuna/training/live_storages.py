"""LiveStorages: the bytes of memory behind the tensors that operations make, while they live."""

from __future__ import annotations

import math
import weakref
from typing import Any

import optree
import torch

# No public way leads to it; tests/training/test_memory_probe.py says first when it goes.
from torch.utils._python_dispatch import TorchDispatchMode

from bs_optuna.training.limit_environment import MAPPED_BYTES


# CUDA's allocator hands out whole blocks of this size.
CUDA_BLOCK_BYTES = 512
# A tensor that the C library maps on its own takes whole pages, and so much beside its data: its
# alignment to 64 bytes and a header (glibc's malloc/malloc.c, _int_memalign and sysmalloc_mmap).
PAGE_BYTES = 4096
MAPPING_BYTES = 128


class TooManyOperationsError(Exception):
    """What is followed goes on for too long."""


class LiveStorages(TorchDispatchMode):
    """Counts what the operations within it allocate on one type of device.

    Args:
        device_type: Of the tensors that count.
        most_operations: How many there may be until `operations` is set back.

    Raises:
        TooManyOperationsError: There are more; from the operation itself.

    Attributes:
        live: Bytes held now.
        peak: Most bytes held at a time; to be set to `live` where counting begins.
        operations: How many tensors or views were made; to be set to 0 likewise.
    """

    def __init__(self, device_type: str, *, most_operations: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._most_operations = most_operations
        self.live = 0
        self.peak = 0
        self.operations = 0
        self._device_type = device_type
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "aten":  # others ask for a device, where PyTorch forbids errors
            self.operations += 1
            if self.operations > self._most_operations:
                raise TooManyOperationsError
        outputs = func(*args, **(kwargs or {}))
        for leaf in optree.tree_leaves(outputs):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == self._device_type:
                self._hold(leaf.untyped_storage())
        if self._device_type == "cpu" and not torch.backends.mkldnn.enabled:
            self.peak = max(self.peak, self.live + _unfolded_bytes(func, args, outputs))
        return outputs

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        before = self._sizes.get(key)
        size = allocated_bytes(storage.nbytes(), self._device_type)
        if before is None:
            weakref.finalize(storage, self._release, key).atexit = False
        self._sizes[key] = size
        self.live += size - (before or 0)
        self.peak = max(self.peak, self.live)

    def _release(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def allocated_bytes(size: int, device_type: str) -> int:
    """What the allocator takes for a tensor of so many bytes.

    On the CPU that is the C library's in a process started with `LIMIT_ENVIRONMENT`.
    """
    if device_type == "cuda":
        return _whole(size, CUDA_BLOCK_BYTES)
    if device_type == "cpu" and size + MAPPING_BYTES > MAPPED_BYTES:
        return _whole(size + MAPPING_BYTES, PAGE_BYTES)
    return size


def _whole(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _unfolded_bytes(func: Any, args: Any, outputs: Any) -> int:
    """What a convolution on the CPU holds beside its output without oneDNN and NNPACK; else 0.

    It unfolds every sample into a matrix of channels times kernel size by positions, unless it
    only mixes channels, and copies the channels of a group (aten/src/ATen/native/Convolution.cpp,
    ConvolutionMM2d.cpp and NaiveConvolutionTranspose2d.cpp).
    """
    if func is torch.ops.aten.convolution.default:
        result, (inputs, weight, _, stride, padding, dilation, transposed, _, groups) = (
            outputs,
            args,
        )
    elif func is torch.ops.aten.convolution_backward.default:
        result, inputs, weight, _, stride, padding, dilation, transposed, _, groups = args[:10]
    else:
        return 0
    copied = (inputs.numel() + result.numel()) // groups if groups > 1 else 0
    kernel = weight.shape[2:]
    wide, narrow = (result, inputs) if transposed else (inputs, result)
    unfolded = wide.shape[1] // groups * math.prod(kernel) * math.prod(narrow.shape[2:])
    if {*kernel, *stride} == {1} and not any(padding):
        unfolded = 0
    elif max(dilation) == 1:  # otherwise one sample at a time
        unfolded *= len(inputs)
    return int((copied + unfolded) * inputs.element_size())

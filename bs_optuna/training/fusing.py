"""Whether an optimizer may step fused where nobody chose its way.

Fused, a step changes all tensors in one operation that allocates nothing, so it needs no copies to
be undone. PyTorch 2.13's fused kernels for the CPU are not right for everything that others take.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor  # stands for a parameter in a prediction


_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
_TENSORS = (nn.Parameter, torch.Tensor, FakeTensor)
# Of lower precision SGD's kernel leaves whole blocks of a tensor as they were.
_TYPES = (torch.float32, torch.float64)


def steps_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the next step may be fused: nobody chose another way, and it is right.

    It is for Adam, AdamW and SGD on a CPU in single or double precision, if every parameter with a
    gradient, that gradient and the state are contiguous (the kernels take no heed of strides, and
    none of sparse gradients), and either all of them have state or none has (SGD's kernel refuses
    a parameter that joins later).
    """
    return type(optimizer) in _FUSED and all(
        _can_be_fused(group, optimizer.state) for group in optimizer.param_groups
    )


def fusible(p: torch.Tensor) -> bool:
    """Whether PyTorch's kernels for the CPU are right for a parameter and a gradient alike it."""
    return p.is_cpu and p.dtype in _TYPES and type(p) in _TENSORS and p.is_contiguous()


def _can_be_fused(group: dict[str, Any], state: Mapping[torch.Tensor, Any]) -> bool:
    if group["fused"] is not None or group["foreach"] is not None or group["differentiable"]:
        return False
    parameters = [p for p in group["params"] if p.grad is not None]
    # A sparse gradient never is contiguous, and one of another type is possible (`grad_dtype`).
    if not all(
        fusible(p) and p.grad.is_contiguous() and p.grad.dtype == p.dtype for p in parameters
    ):
        return False
    entries = [entry for p in parameters if (entry := state.get(p))]
    return len(entries) in (0, len(parameters)) and all(
        tensor.is_contiguous()
        for entry in entries
        for tensor in entry.values()
        if isinstance(tensor, torch.Tensor)
    )

"""Batches as pytrees of tensors whose first dimension is the sample: cut, moved, counted."""

from __future__ import annotations

from collections import OrderedDict
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import optree
import torch
from torch import nn


Batch = tuple[Any, Any]


def call_model(model: nn.Module, inputs: Any) -> Any:
    """``model(*inputs)`` for a tuple, ``model(**inputs)`` for a dict, else ``model(inputs)``."""
    if isinstance(inputs, tuple):
        return model(*inputs)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(inputs)


def plain(tree: Any) -> Any:
    """A mapping of another kind, such as the BatchEncoding of a tokenizer, as a dict."""
    other = isinstance(tree, Mapping) and type(tree) not in (dict, OrderedDict, defaultdict)
    return dict(tree) if other else tree


def take(batch: Any, samples: slice | torch.Tensor) -> Any:
    """The given samples of every tensor in a pytree; a slice gives views.

    Raises:
        TypeError: A tensor is a nested one, or a sparse one of compressed rows, say.
    """
    if any(getattr(leaf, "is_nested", False) for leaf in optree.tree_leaves(batch)):
        raise TypeError(
            "The batch holds a nested tensor, which cannot be cut into microbatches; pad it, as "
            "with torch.nested.to_padded_tensor, and see lengths and trim."
        )
    return optree.tree_map(lambda leaf: _taken(leaf, samples), batch)


def _taken(leaf: torch.Tensor, samples: slice | torch.Tensor) -> torch.Tensor:
    if leaf.layout == torch.strided:
        return leaf[samples]
    if leaf.layout != torch.sparse_coo:
        raise TypeError(
            f"The batch holds a tensor of layout {leaf.layout}, which cannot be cut into "
            "microbatches; make it dense, or tensor.to_sparse_coo()."
        )
    if isinstance(samples, slice):
        samples = torch.arange(*samples.indices(len(leaf)))
    return leaf.index_select(0, samples.to(leaf.device))


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch with inputs and targets on the device.

    Where one of the inputs is there already, somebody has placed them, as beside the lengths of a
    packed sequence, which stay on the host; likewise of the targets.
    """
    inputs, targets = batch
    return _moved(inputs, device), _moved(targets, device)


def _moved(tree: Any, device: torch.device) -> Any:
    leaves: list[torch.Tensor] = optree.tree_leaves(tree)
    if any(leaf.device == device for leaf in leaves):
        return tree
    return optree.tree_map(partial(_to, device), tree)


def _to(device: torch.device, leaf: torch.Tensor) -> torch.Tensor:
    # To the host nothing would wait until it is there.
    return leaf.to(device, non_blocking=device.type != "cpu")


def batch_length(batch: Any) -> int:
    """Number of samples in a pytree of tensors.

    Raises:
        ValueError: There is none, or the tensors disagree.
        TypeError: A leaf is no tensor, or one without dimensions.
    """
    lengths = set()
    for leaf in optree.tree_leaves(batch):
        if not isinstance(leaf, torch.Tensor) or leaf.ndim == 0:
            raise TypeError(
                f"The batch holds {_described(leaf)}; every leaf must be a tensor whose first "
                "dimension is the sample. Keep constants in the model or the loss function."
            )
        lengths.add(len(leaf))
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"The tensors of the batch hold {sorted(lengths) or 'no'} samples; "
            "all must hold the same number, at least 1."
        )
    return lengths.pop()


def _described(leaf: object) -> str:
    if isinstance(leaf, torch.Tensor):
        return "a tensor without dimensions"
    if isinstance(leaf, np.ndarray):
        return f"a NumPy array of shape {leaf.shape}, which torch.from_numpy makes a tensor"
    if isinstance(leaf, bool | int | float | str):
        return f"{leaf!r:.60}"
    return f"a {type(leaf).__name__}"


def refuse_computed(batch: Any) -> None:
    """Refuses tensors that have a history, which one backward of several would use up.

    Raises:
        ValueError: A tensor requires grad and is no leaf.
    """
    for leaf in optree.tree_leaves(batch):
        if leaf.requires_grad and not leaf.is_leaf:
            raise ValueError(
                f"The batch holds a tensor of shape {tuple(leaf.shape)} that was computed with "
                "gradients; a batch in parts would go back through that more than once. Put what "
                "computed it into the model, or pass x = tensor.detach().requires_grad_() and then "
                "call tensor.backward(x.grad)."
            )

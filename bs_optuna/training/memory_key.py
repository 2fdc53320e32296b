"""The key under which knowledge about fitting microbatches is kept: what it depends on."""

from __future__ import annotations

import hashlib

import optree
import torch
from torch import nn

from bs_optuna.training.data import first_samples
from bs_optuna.training.task import TrainingTask


def memory_key(task: TrainingTask, *, device: torch.device, limit_bytes: int | None) -> str:
    """A short digest of model, loss, sample, optimizer, device and limit.

    What fits is true for one such combination only: a small model must not inherit the microbatch
    of a big one.

    Args:
        task: Its model is built once, for the shapes and types of its parameters.
        device: Where it is trained.
        limit_bytes: The limit on memory, if there is one.
    """
    model = task.new_model()
    inputs, targets = first_samples(task.train_data, 1)
    leaves: list[torch.Tensor] = [*optree.tree_leaves(inputs), *optree.tree_leaves(targets)]
    parts = (
        type(model).__name__,
        _parameters(model),
        [(tuple(leaf.shape), str(leaf.dtype)) for leaf in leaves],
        task.optimizer if isinstance(task.optimizer, str) else _name(task.optimizer),
        _device_name(device),
        limit_bytes,
        # Where samples vary in length, sizes are in other units.
        *(() if task.longest is None else (task.longest, task.trim is None)),
        *(_parameters(task.loss) if isinstance(task.loss, nn.Module) else ()),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _parameters(module: nn.Module) -> list[tuple[str, tuple[int, ...], str]]:
    return [(name, tuple(p.shape), str(p.dtype)) for name, p in module.named_parameters()]


def _name(factory: object) -> str:
    return getattr(factory, "__qualname__", type(factory).__qualname__)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)

"""The key under which knowledge about fitting microbatches is kept: what it depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import CodeType
from typing import Any

import optree
import torch
from torch import nn

from bs_optuna.training.data import first_samples
from bs_optuna.training.recipes import optimizer_factory
from bs_optuna.training.snapshot import parameters_of
from bs_optuna.training.task import TrainingTask


def memory_key(task: TrainingTask, *, device: torch.device, limit_bytes: int | None) -> str:
    """A short digest of model, loss, sample, optimizer, device and limit.

    What fits is true for one such combination only: a small model must not inherit the microbatch
    of a big one. Two models with the same parameters differ if a layer runs a hundred times in one
    of them, so their settings and the code of ``forward`` count too.

    Args:
        task: Its model and optimizer are built once.
        device: Where it is trained.
        limit_bytes: The limit on memory, if there is one.
    """
    model = task.new_model()
    inputs, targets = first_samples(task.train_data, 1)
    leaves: list[torch.Tensor] = [*optree.tree_leaves(inputs), *optree.tree_leaves(targets)]
    parts = (
        _described(model),
        [(tuple(leaf.shape), str(leaf.dtype)) for leaf in leaves],
        _optimizer(task, model),
        _device_name(device),
        limit_bytes,
        # Where samples vary in length, sizes are in other units.
        *(() if task.longest is None else (task.longest, task.trim is None)),
        _described(task.loss) if isinstance(task.loss, nn.Module) else _code(task.loss),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _described(root: nn.Module) -> list[tuple[Any, ...]]:
    parameters = [(name, tuple(p.shape), str(p.dtype)) for name, p in root.named_parameters()]
    modules = [
        (name, type(m).__qualname__, _plain(vars(m)), _code(type(m).forward))
        for name, m in root.named_modules()
    ]
    return [*parameters, *modules]


def _plain(settings: Mapping[str, Any]) -> list[tuple[str, bool | int | str | None]]:
    """Those that are whole numbers and words: how deep, how wide, whether."""
    return [(k, v) for k, v in sorted(settings.items()) if v is None or isinstance(v, int | str)]


def _code(function: object) -> tuple[Any, ...]:
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        return ()
    numbers = [c for c in code.co_consts if isinstance(c, int | float)]
    return code.co_code, code.co_names, numbers


def _optimizer(task: TrainingTask, model: nn.Module) -> tuple[Any, ...]:
    # Built, as a function or a lambda has no name that tells what it makes.
    trained = parameters_of([m for m in (model, task.loss) if isinstance(m, nn.Module)])
    made = optimizer_factory(task.optimizer)(trained, 1e-3)
    # Whether there is momentum decides how many states there are; how much does not.
    settings = {k: bool(v) if isinstance(v, float) else v for k, v in made.defaults.items()}
    return type(made).__qualname__, _plain(settings)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)

"""The key under which knowledge about fitting microbatches is kept: what it depends on."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import re
from contextlib import suppress
from functools import partial
from types import CodeType
from types import SimpleNamespace
from typing import Any

import optree
import torch
from torch import nn

from bs_optuna.training.data import first_samples
from bs_optuna.training.host_memory import total_host_bytes
from bs_optuna.training.recipes import checked_optimizer
from bs_optuna.training.snapshot import parameters_of
from bs_optuna.training.task import TrainingTask


# A model that is on one of several equal devices is the same on another.
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:\d+)?")
_LONGEST = 64  # of lists, such as a vocabulary, that are looked into
_DEEPEST = 4


def memory_key(
    task: TrainingTask, *, device: torch.device, limit_bytes: int | None, processes: int = 1
) -> str:
    """A short digest of model, loss, sample, optimizer, device and limit.

    What fits is true for one such combination only: a small model must not inherit the microbatch
    of a big one. Two models with the same parameters differ if a layer runs a hundred times in one
    of them, so the plain settings of modules and the code of their classes count too, but for
    settings that differ between two models that the task makes, such as an id. Functions that the
    classes call are not looked into.

    Args:
        task: Its model and its optimizer are built twice.
        device: Where it is trained.
        limit_bytes: The limit on memory, if there is one.
        processes: How many share the memory, where each has no limit of its own.
    """
    once = _described(task.new_model())
    model = task.new_model()
    inputs, targets = first_samples(task.train_data, 1)
    leaves: list[torch.Tensor] = [*optree.tree_leaves(inputs), *optree.tree_leaves(targets)]
    parts = (
        [part for part, other in zip(once, _described(model), strict=False) if part == other],
        [(tuple(leaf.shape), str(leaf.dtype)) for leaf in leaves],
        _optimizer(task, model),
        torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        _share(device, processes) if limit_bytes is None else limit_bytes,
        # Where samples vary in length, sizes are in other units.
        *(() if task.longest is None else (task.longest, task.trim is None)),
        _described(task.loss) if isinstance(task.loss, nn.Module) else _function(task.loss),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _described(root: nn.Module) -> list[tuple[Any, ...]]:
    """Parameters, the code of all classes, and class and settings of each module, a tuple each."""
    found: list[tuple[Any, ...]] = [
        (name, tuple(p.shape), str(p.dtype)) for name, p in root.named_parameters()
    ]
    kinds = dict.fromkeys(type(module) for module in root.modules())
    found += [(kind.__qualname__, _methods(kind)) for kind in kinds]
    for name, module in root.named_modules():
        found.append((name, type(module).__qualname__))
        public = {k: v for k, v in vars(module).items() if not str(k).startswith("_")}
        found += [(name, key, _plain(value)) for key, value in public.items()]
    return found


def _plain(value: Any, depth: int = 0) -> Any:
    """Numbers, words, and lists and records of them; of anything else only the type."""
    if isinstance(value, str) and _DEVICE.fullmatch(value):
        return "device"
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if dataclasses.is_dataclass(value) or isinstance(value, SimpleNamespace):
        value = dict(getattr(value, "__dict__", {}))  # none with slots
    if isinstance(value, dict):
        value = [*value.items()]
    if isinstance(value, list | tuple) and depth < _DEEPEST and len(value) <= _LONGEST:
        return [_plain(v, depth + 1) for v in value]
    return type(value).__qualname__


def _methods(kind: type) -> list[Any]:
    """The code of all methods, but for those of PyTorch's own classes."""
    own = [c for c in kind.__mro__ if not c.__module__.startswith(("torch.", "builtins"))]
    return [
        (name, _code(f), _globals_of(f))
        for c in own
        for name, f in vars(c).items()
        if inspect.isfunction(f)
    ]


def _function(function: Any) -> Any:
    """The code of a function, with what was fixed in it."""
    if isinstance(function, partial):
        return _function(function.func), _plain(function.args), _plain(function.keywords)
    closed = []
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # it is empty
            closed.append(_plain(cell.cell_contents))
    return _code(function), closed, _globals_of(function)


def _globals_of(function: Any) -> list[Any]:
    """Constants of its module that it names, as one that says how deep a model is."""
    names = getattr(function, "__globals__", {})
    used = getattr(getattr(function, "__code__", None), "co_names", ())
    kinds = (bool, int, float, str)
    return [(n, names[n]) for n in used if n.isupper() and type(names.get(n)) in kinds]


def _code(function: Any) -> Any:
    code = function if isinstance(function, CodeType) else getattr(function, "__code__", None)
    if code is None:
        return getattr(function, "__qualname__", type(function).__qualname__)
    inner = [_code(c) if isinstance(c, CodeType) else _plain(c) for c in code.co_consts]
    return code.co_code, code.co_names, inner


def _optimizer(task: TrainingTask, model: nn.Module) -> Any:
    # Built, as a function or a lambda has no name that tells what it makes.
    trained = parameters_of([m for m in (model, task.loss) if isinstance(m, nn.Module)])
    made = checked_optimizer(task.optimizer, trained)
    # Whether there is momentum decides how many states there are; how much does not.
    settings = {
        key: bool(value) if isinstance(value, int | float) else _plain(value)
        for key, value in getattr(made, "defaults", {}).items()
    }
    return type(made).__qualname__, settings


def _share(device: torch.device, processes: int) -> int | None:
    """About, to an eighth or less: two machines of a kind, or a kernel later, are the same."""
    if device.type == "cuda":
        total = int(torch.cuda.get_device_properties(device).total_memory)
    elif device.type == "cpu":
        total = total_host_bytes() or 0
    else:
        return None
    share = total // processes
    return share >> max(0, share.bit_length() - 4) << max(0, share.bit_length() - 4)

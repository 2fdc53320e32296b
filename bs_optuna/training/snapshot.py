"""What forward and backward change beside the optimizer: gradients, buffers, random states; undone.

Nothing is allocated while an attempt is undone: that happens when memory has just run out.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import optree
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from bs_optuna.training.buffer_copies import BufferCopies


class StepSnapshot:
    """The state before an attempt; ``commit`` keeps what the attempt did, ``restore`` undoes it.

    Gradients that exist before the step are set aside and added back by ``commit``; ``finish`` then
    leaves the sums in the same tensors, as PyTorch does. The random
    states are those of the CPU, the device of the parameters, and Python and NumPy if asked for; a
    generator that the model keeps for itself is not known here.

    Args:
        modules: Every module whose buffers the step may change, those within others too.
        parameters: Their parameters; looking for either takes longer than all the rest.
        batch: The pytree of tensors whose own gradients are looked after as well.
        buffers: Of these modules, kept by the caller from step to step.
        device_types: Of the devices whose random states may be drawn from, beside the CPU's.
        foreign: Whether the random states of Python and NumPy may be drawn from.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        parameters: Sequence[nn.Parameter],
        batch: Any,
        *,
        buffers: BufferCopies,
        device_types: Collection[str],
        foreign: bool,
    ) -> None:
        self._modules = modules
        self._parameters = parameters
        # All of them: forward may unfreeze some.
        self._trained = [p.requires_grad for p in parameters]
        self._leaves = _leaves(parameters, batch)
        self._given = len(self._leaves)
        self._gradients = [leaf.grad for leaf in self._leaves]
        self._had_gradients = any(gradient is not None for gradient in self._gradients)
        self._copies = buffers
        self._buffers = buffers.save()
        self._empty = {
            (id(m), name) for m in modules for name, b in m._buffers.items() if b is None
        }
        self._random = RandomStates(device_types, foreign=foreign)
        if self._had_gradients:
            for leaf in self._leaves:
                leaf.grad = None

    def given(self) -> set[int]:
        """The ids of all tensors whose gradients ``restore`` puts back anyway."""
        return set(map(id, self._leaves[: self._given]))

    def look_after(self, leaf: torch.Tensor) -> None:
        """Puts back the gradient of one more tensor, which has none yet."""
        self._leaves = [*self._leaves, leaf]
        self._gradients.append(None)

    def commit(self) -> None:
        """Adds the gradients that were there before, which stay as they are for ``restore``."""
        if not self._had_gradients:
            return
        for leaf, before in zip(self._leaves, self._gradients, strict=True):
            if leaf.grad is None:
                leaf.grad = before
            elif before is None:
                continue
            elif leaf.grad.layout == torch.strided or before.layout != torch.strided:
                leaf.grad.add_(before)
            else:
                leaf.grad = before + leaf.grad  # a dense tensor cannot be added to a sparse one

    def finish(self) -> None:
        """Puts what was committed into the tensors that were there, of which others may hold views.

        There is no ``restore`` after it. A tensor that cannot be written to is replaced.
        """
        self._copies.settle(self._buffers)
        if not self._had_gradients:
            return
        with torch.no_grad():
            for leaf, before in zip(self._leaves, self._gradients, strict=True):
                if before is None or leaf.grad is None or leaf.grad is before:
                    continue
                strided = before.layout == leaf.grad.layout == torch.strided
                if strided and before.dtype == leaf.grad.dtype:
                    with suppress(RuntimeError, MemoryError):  # the sum is right where it is, too
                        leaf.grad = before.copy_(leaf.grad)

    def restore(self) -> None:
        """Puts gradients, buffers and random states back to what they were."""
        for parameter, trained in zip(self._parameters, self._trained, strict=True):
            if parameter.requires_grad != trained:
                parameter.requires_grad_(trained)
        for leaf, before in zip(self._leaves, self._gradients, strict=True):
            leaf.grad = before
        self._random.restore()
        failed = self._restore_buffers()
        known = {saved.key for saved in self._buffers}
        for module, name, _ in list(self._copies.named()):
            if (id(module), name) in self._empty:
                setattr(module, name, None)
            elif (id(module), name) not in known:  # registered in the attempt
                delattr(module, name)
        if failed is not None:
            raise failed

    def _restore_buffers(self) -> Exception | None:
        """Puts all back that can be; why the first of the others cannot."""
        failed: Exception | None = None
        with torch.no_grad():
            for saved in self._buffers:
                try:
                    saved.restore()
                except (RuntimeError, KeyError, AttributeError) as error:
                    failed = failed or error
        return failed

    def check_complete(self) -> None:
        """Refuses to go on after ``restore`` where it has not put back everything.

        Raises:
            RuntimeError: A parameter that was not given has a gradient, or a module a buffer.
        """
        given = {*map(id, self._parameters), *map(id, self._modules)}
        for root in self._modules:
            for name, parameter in root.named_parameters():
                if id(parameter) not in given and parameter.grad is not None:
                    raise _joined(f"parameter {name!r}", "its gradient")
            for name, module in root.named_modules():
                if id(module) not in given and any(True for _ in module.buffers(recurse=False)):
                    raise _joined(f"module {name!r}", "its buffers")


def draws_foreign(model: nn.Module, loss_fn: object) -> bool:
    """Whether model or loss hold code that is not PyTorch's, which draws from neither."""
    parts = [m for root in (model, loss_fn) if isinstance(root, nn.Module) for m in root.modules()]
    own = any("forward" in vars(m) or not _is_torchs(type(m)) for m in parts)
    return own or not (isinstance(loss_fn, nn.Module) or _is_torchs(loss_fn))


def _is_torchs(thing: object) -> bool:
    return str(getattr(thing, "__module__", "")).startswith("torch.")


def parameters_of(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The parameters of all modules, each once."""
    return list({id(p): p for module in modules for p in module.parameters()}.values())


def refuse_lazy(modules: Sequence[nn.Module]) -> None:
    """Refuses parameters and buffers that the first forward pass will make.

    Raises:
        ValueError: There is one.
    """
    for root in modules:
        for name, tensor in (*root.named_parameters(), *root.named_buffers()):
            if is_lazy(tensor):
                raise ValueError(
                    f"{name!r} of the {type(root).__name__} has no shape before its first forward "
                    "pass, which could not be undone; call the model once on a sample first."
                )


def device_of(*parts: object) -> torch.device:
    """Of the first parameter of those that are modules; the default one where there is none."""
    modules = [part for part in parts if isinstance(part, nn.Module)]
    return next(iter(parameters_of(modules)), torch.empty(0)).device


def _leaves(parameters: Sequence[nn.Parameter], batch: Any) -> Sequence[torch.Tensor]:
    tensors = [t for t in optree.tree_leaves(batch) if t.requires_grad and t.is_leaf]
    if not tensors:
        return parameters
    return list({id(t): t for t in (*parameters, *tensors)}.values())


def _joined(what: str, lost: str) -> RuntimeError:
    return RuntimeError(
        f"{what} joined the model after its AccumulatedBackward was made, so {lost} could not be "
        "put back; zero the gradients and make a new AccumulatedBackward whenever the model is "
        "changed."
    )


class RandomStates:
    """The states of every global generator that a pass or a step may draw from.

    Args:
        device_types: Of the devices that draw, beside the CPU.
        foreign: Whether Python's and NumPy's are among them; reading these takes longer than all
            the rest.
    """

    def __init__(self, device_types: Collection[str], *, foreign: bool = True) -> None:
        self._foreign = (random.getstate(), np.random.get_state()) if foreign else None
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if "cuda" in device_types else None
        self._xpu = torch.xpu.get_rng_state_all() if "xpu" in device_types else None
        self._mps = torch.mps.get_rng_state() if "mps" in device_types else None

    def restore(self) -> None:
        """Puts every generator back."""
        if self._foreign is not None:
            python, numpy = self._foreign
            random.setstate(python)
            np.random.set_state(numpy)
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        if self._xpu is not None:
            torch.xpu.set_rng_state_all(self._xpu)
        if self._mps is not None:
            torch.mps.set_rng_state(self._mps)

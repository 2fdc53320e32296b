"""GuardedStep: an optimizer's step that either happens or leaves no trace, and is tried again."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Iterable
from functools import partial
from typing import Any

import optree
import torch
from torch import nn

from bs_optuna.errors import StepDoesNotFitError
from bs_optuna.training.oom import OutOfMemory
from bs_optuna.training.oom import classify
from bs_optuna.training.oom import empty_caches
from bs_optuna.training.oom import release
from bs_optuna.training.snapshot import RandomStates


_logger = logging.getLogger(__name__)

# No microbatch is at work in a step: only what empties in between can help, and that helps once.
ATTEMPTS = 3

# Fused, these create their state and then change all tensors of a group in one operation that
# allocates nothing: whatever fails, fails before a parameter was touched.
_IN_PLACE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)


_Copies = list[tuple[list[torch.Tensor], Iterable[torch.Tensor]]]


class GuardedStep:
    """Clips, steps and updates the scale; when memory runs out, undoes the step and tries again.

    PyTorch's own step stops in the middle: some parameters are stepped and others not, some have
    half of their state, and another call steps the first ones twice or raises KeyError. Here
    parameters, optimizer state, its settings and the random states are put back, unused memory is
    given back to the device, and the step is done again, up to three times in all.

    What it costs depends on the optimizer. Adam, AdamW, SGD and Adagrad with ``fused=True`` cannot
    stop in the middle, so only the step counters are copied: microseconds. Any other optimizer,
    and every one with a scaler, has its parameters and state copied for the length of each step,
    on their device, or in the host's memory once the device had no room for that. The same goes
    for the first step of a fused one with several groups, devices or types of parameters.

    Not looked after: attributes of an optimizer other than ``state`` and ``param_groups``, and what
    hooks on its step do.

    Args:
        optimizer: Called without a closure.
        max_norm: Clips the gradients to this norm before the step.
        scaler: The scaler of the gradients, for this optimizer alone; they are unscaled, checked
            and the scale updated here, so leave ``unscale_``, ``step`` and ``update`` out.

    Example:
        >>> step = GuardedStep(optimizer, max_norm=1.0)
        >>> for inputs, targets in loader:
        ...     optimizer.zero_grad()
        ...     backward(inputs, targets)
        ...     step()
        ...     scheduler.step()
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        max_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm={max_norm}; must be above 0, or None for no clipping.")
        self._optimizer = optimizer
        self._max_norm = max_norm
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None

    def __call__(self) -> None:
        """Steps once with the gradients in ``.grad``.

        Raises:
            StepDoesNotFitError: The step does not fit. Parameters, optimizer state, scale and
                random states are as before; gradients may be unscaled or clipped.
        """
        parts = _parts(self._optimizer)
        if self._scaler is not None:
            # It works part by part: with several, one that failed may have left some unscaled.
            attempts = ATTEMPTS if len(parts) == 1 else 1
            self._survive("unscale_", partial(self._scaler.unscale_, self._optimizer), attempts)
        if self._max_norm is not None:
            self._clip(parts, self._max_norm)
        in_place = self._scaler is None and _steps_in_place(self._optimizer, parts)
        parameters = [p for part in parts for p in part]
        guard = partial(_Before, self._optimizer, parameters, in_place)
        self._survive("optimizer.step", self._step, guard=guard)
        if self._scaler is not None:
            self._survive("GradScaler.update", self._scaler.update)

    def _clip(self, parts: list[list[torch.Tensor]], max_norm: float) -> None:
        grads = [p.grad for part in parts for p in part if p.grad is not None]
        norm = self._survive("clipping", partial(nn.utils.get_total_norm, grads))
        for part in parts:  # each is scaled in one operation, which happens or does not
            scale = partial(nn.utils.clip_grads_with_norm_, part, max_norm, norm)
            self._survive("clipping", scale)

    def _step(self) -> None:
        if self._scaler is None:
            self._optimizer.step()
        else:
            self._scaler.step(self._optimizer)

    def _survive(
        self,
        what: str,
        action: Callable[[], Any],
        attempts: int = ATTEMPTS,
        guard: Callable[[bool], _Before] | None = None,
    ) -> Any:
        for attempt in range(attempts):
            outcome = _attempt(action, None if guard is None else partial(guard, attempt > 0))
            if not isinstance(outcome, OutOfMemory):
                return outcome
            empty_caches()
            _logger.info("out of memory in %s, attempt %d of %d", what, attempt + 1, attempts)
            if not outcome.retryable:
                break
        if self._scaler is not None:  # forgets this step's gradients, keeps the scale
            self._scaler.update(new_scale=self._scaler.get_scale())
        raise _does_not_fit(what, outcome)


class _Before:
    """What a step may change, before it; restored in place.

    Args:
        optimizer: About to step.
        parameters: Those that it will change.
        in_place: Whether parameters and large state need no copy.
        on_host: Whether to keep the copies in the host's memory.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: list[torch.Tensor],
        in_place: bool,
        on_host: bool,
    ) -> None:
        self._optimizer = optimizer
        self._attributes = dict(vars(optimizer))
        # Optree's walk takes as long as a small step does; what steps in place keeps flat dicts.
        copied: Callable[[Any], Any] = dict if in_place else _containers_copied
        leaves: Callable[[Any], Iterable[Any]] = dict.values if in_place else optree.tree_leaves
        self._state = {key: copied(entry) for key, entry in optimizer.state.items()}
        self._settings = [copied(_settings(group)) for group in optimizer.param_groups]
        kept = (*self._state.values(), *self._settings)
        tensors = [x for entry in kept for x in leaves(entry) if isinstance(x, torch.Tensor)]
        if in_place:
            self._copies = _counters(tensors)
        else:
            tensors += parameters
            self._copies = [(tensors, [_copy(t, "cpu" if on_host else t.device) for t in tensors])]
        # Nothing is drawn by those that step in place.
        self._random = None if in_place else RandomStates(parameters)

    def restore(self) -> None:
        with torch.no_grad():
            for tensors, copies in self._copies:
                for tensor, copy in zip(tensors, copies, strict=True):
                    tensor.copy_(copy)
        state = self._optimizer.state
        state.clear()
        state.update(self._state)
        for group, settings in zip(self._optimizer.param_groups, self._settings, strict=True):
            parameters = group["params"]
            group.clear()
            group.update({"params": parameters, **settings})
        vars(self._optimizer).clear()
        vars(self._optimizer).update(self._attributes)
        if self._random is not None:
            self._random.restore()


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _copy(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    return tensor.detach().to(device, copy=True)


def _containers_copied(tree: Any) -> Any:
    return optree.tree_map(lambda leaf: leaf, tree)


def _counters(tensors: list[torch.Tensor]) -> _Copies:
    """The tensors of one element and their copies, made in one operation for those alike."""
    alike = defaultdict(list)
    for tensor in tensors:
        if tensor.numel() == 1:
            alike[tensor.device, tensor.dtype, tensor.shape].append(tensor)
    return [(same, torch.stack(same)) for same in alike.values()]


def _attempt(action: Callable[[], Any], guard: Callable[[], _Before] | None) -> Any:
    """What the action returns, or what ran out; then nothing is left of the attempt."""
    before = None
    try:
        before = None if guard is None else guard()
        return action()
    except Exception as error:
        verdict = classify(error)
        if verdict is None:
            raise
        failed = error
    # Outside the except block: inside, its traceback would keep the temporaries alive.
    release(failed)
    if before is not None:
        before.restore()
    return verdict


def _parts(optimizer: torch.optim.Optimizer) -> list[list[torch.Tensor]]:
    """The parameters with a gradient, by group, device and type: what one fused call can take."""
    parts = defaultdict(list)
    for number, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if p.grad is not None:
                parts[number, p.device, p.dtype].append(p)
    return list(parts.values())


def _steps_in_place(optimizer: torch.optim.Optimizer, parts: list[list[torch.Tensor]]) -> bool:
    """Whether a failure can only come before the first parameter is touched."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    if type(optimizer) not in _IN_PLACE or not fused:
        return False
    # The state of a later part is created when the first has already been stepped.
    return len(parts) <= 1 or all(optimizer.state.get(p) for part in parts for p in part)


def _does_not_fit(what: str, verdict: OutOfMemory) -> StepDoesNotFitError:
    asked = "" if verdict.bytes_requested is None else f", {verdict.bytes_requested:,} bytes more"
    if verdict.retryable:
        remedy = "use a smaller model, a fused optimizer or one with less state, or more memory"
    else:
        remedy = "the device is unusable after this failure: start the process anew"
    return StepDoesNotFitError(
        f"Out of memory ({verdict.kind}) in {what}{asked}; {remedy}.",
        bytes_requested=verdict.bytes_requested,
    )

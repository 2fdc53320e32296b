"""GuardedStep: an optimizer's step that either happens or leaves no trace, and is tried again."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Iterable
from functools import partial
from typing import Any

import optree
import torch
from torch import nn

from bs_optuna.errors import StepDoesNotFitError
from bs_optuna.training.lost import Lost
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

    Attributes:
        lost: What running out of memory has cost in all calls together.

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
        self.lost = Lost()
        self._optimizer = optimizer
        self._max_norm = max_norm
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None

    def __call__(self) -> None:
        """Steps once with the gradients in ``.grad``.

        Raises:
            StepDoesNotFitError: The step does not fit. Parameters, optimizer state, scale and
                random states are as before; gradients may be unscaled or clipped.
        """
        if self._scaler is not None:
            # It works part by part: with several, one that failed may have left some unscaled.
            attempts = ATTEMPTS if len(_parts(self._optimizer)) == 1 else 1
            self._survive("unscale_", partial(self._scaler.unscale_, self._optimizer), attempts)
        if self._max_norm is not None:
            self._clip(_parts(self._optimizer), self._max_norm)
        self._survive("optimizer.step", self._step, guard=self._guard())
        if self._scaler is not None:
            self._survive("GradScaler.update", self._scaler.update)

    def _guard(self) -> Callable[[bool], _Before | _Counters]:
        optimizer = self._optimizer
        in_place = self._scaler is None and _steps_in_place(optimizer)
        parameters = _stepped(optimizer)
        if in_place and all(map(optimizer.state.get, parameters)):
            return lambda on_host: _Counters(optimizer)
        # The state of a later part is created when the first has already been stepped.
        in_place = in_place and len(_parts(optimizer)) <= 1
        return partial(_Before, optimizer, parameters, in_place)

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
        guard: Callable[[bool], _Before | _Counters] | None = None,
    ) -> Any:
        for attempt in range(attempts):
            began = time.perf_counter()
            outcome = _attempt(action, None if guard is None else partial(guard, attempt > 0))
            if not isinstance(outcome, OutOfMemory):
                return outcome
            empty_caches()
            self.lost.add(began)
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
        self._state = {key: _containers_copied(e) for key, e in optimizer.state.items()}
        self._settings = [_containers_copied(_settings(group)) for group in optimizer.param_groups]
        kept = (*self._state.values(), *self._settings)
        tensors = [x for e in kept for x in optree.tree_leaves(e) if isinstance(x, torch.Tensor)]
        if in_place:
            tensors = [t for t in tensors if t.numel() == 1]
        else:
            tensors += parameters
        copies = [_copy(t, "cpu" if on_host else t.device) for t in tensors]
        self._copies: _Copies = [(tensors, copies)]
        # Nothing is drawn by those that step in place.
        self._random = None if in_place else RandomStates(parameters)

    def restore(self) -> None:
        _write_back(self._copies)
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


class _Counters:
    """The step counters: all that is left half done by one that steps in place and has its state.

    Args:
        optimizer: About to step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        counters = defaultdict(list)
        for entry in optimizer.state.values():
            if (step := entry.get("step")) is not None:
                counters[step.device].append(step)
        self._copies: _Copies = [(same, torch.stack(same)) for same in counters.values()]

    def restore(self) -> None:
        _write_back(self._copies)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _copy(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    return tensor.detach().to(device, copy=True)


def _containers_copied(tree: Any) -> Any:
    return optree.tree_map(lambda leaf: leaf, tree)


def _write_back(copies: _Copies) -> None:
    with torch.no_grad():
        for tensors, copied in copies:
            for tensor, copy in zip(tensors, copied, strict=True):
                tensor.copy_(copy)


def _attempt(action: Callable[[], Any], guard: Callable[[], _Before | _Counters] | None) -> Any:
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


def _stepped(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The parameters with a gradient."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _parts(optimizer: torch.optim.Optimizer) -> list[list[torch.Tensor]]:
    """The parameters with a gradient, by group, device and type: what one fused call can take."""
    parts = defaultdict(list)
    for number, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if p.grad is not None:
                parts[number, p.device, p.dtype].append(p)
    return list(parts.values())


def _steps_in_place(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a failure comes before the parameters of a part are touched, once it has state."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and type(optimizer) in _IN_PLACE


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

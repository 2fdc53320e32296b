"""GuardedStep: an optimizer's step, which is undone and tried again when memory runs out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bs_optuna.training.fusing import steps_fused
from bs_optuna.training.lost import Lost
from bs_optuna.training.oom import OutOfMemory
from bs_optuna.training.oom import classify
from bs_optuna.training.oom import empty_caches
from bs_optuna.training.oom import release
from bs_optuna.training.optimizer_snapshot import CounterSnapshot
from bs_optuna.training.optimizer_snapshot import OptimizerSnapshot
from bs_optuna.training.ranks import Ranks
from bs_optuna.training.step_groups import StepGroups
from bs_optuna.training.step_outcome import DOES_NOT_FIT
from bs_optuna.training.step_outcome import DONE
from bs_optuna.training.step_outcome import PARTLY
from bs_optuna.training.step_outcome import does_not_fit
from bs_optuna.training.step_outcome import elsewhere
from bs_optuna.training.step_outcome import report
from bs_optuna.training.step_parts import groups_alike
from bs_optuna.training.step_parts import groups_with_gradients
from bs_optuna.training.step_parts import has_its_state
from bs_optuna.training.step_parts import is_compiled
from bs_optuna.training.step_parts import parameters_with_gradients
from bs_optuna.training.step_parts import parts_of
from bs_optuna.training.step_parts import steps_in_place


_logger = logging.getLogger(__name__)

# No microbatch is at work in a step: only what empties in between can help, and that helps once.
ATTEMPTS = 3

_Snapshot = OptimizerSnapshot | CounterSnapshot


class GuardedStep:
    """Clips, steps and updates the scale; when memory runs out, undoes the step and tries again.

    PyTorch's own step stops in the middle: some parameters are stepped and others not, some have
    half of their state, and another call steps the first ones twice or raises KeyError. Here
    parameters, optimizer state, its settings and the random states are put back, unused memory is
    given back to the device, and the step is done again, up to three times in all.

    What it costs depends on the optimizer. Adam, AdamW, SGD and Adagrad with ``fused=True`` cannot
    stop in the middle of a group, so only the step counters are copied: microseconds. A group that
    was stepped before another one failed stays so, and is left out when the step is tried again;
    only if that never fits is there a trace of it, which the error says. On a CPU an Adam, AdamW or
    SGD for which neither ``fused`` nor ``foreach`` was chosen steps fused here wherever that is the
    same but for rounding (see `steps_fused`). Any other optimizer, and every one with a scaler, has
    its parameters and state copied for the length of each step, on their device, or in the host's
    memory once the device had no room for that. The same goes for the first step of a fused one
    with several groups, and for each step of one with several devices or types in a group.

    A hook after a step that runs out of memory is called again, without a second step by one that
    steps fused. An optimizer that is not PyTorch's own may change the gradients, which are copied
    too, and may wrap another one, whose state is. What hooks change, and what else an optimizer
    keeps in objects of its own, is not looked after.

    Args:
        optimizer: Called without a closure.
        max_norm: Clips the gradients to this norm before the step.
        scaler: The scaler of the gradients, for this optimizer alone; they are unscaled, checked
            and the scale updated here, so leave ``unscale_``, ``step`` and ``update`` out.
        process_group: The ranks that step together, as in `AccumulatedBackward`: where one cannot,
            none does.

    Attributes:
        lost: What running out of memory has cost in all calls together; of several ranks, what
            this one has undone.

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
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm={max_norm}; must be above 0, or None for no clipping.")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer={optimizer!r:.60}; must be a torch.optim.Optimizer.")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "LBFGS steps by a closure, with passes of its own over the batch, which are not "
                "undone here; use an optimizer that steps without one, such as AdamW."
            )
        self.lost = Lost()
        self._optimizer = optimizer
        self._max_norm = max_norm
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._kept: _Snapshot | None = None  # from a step that the other ranks may have undone
        self._groups: StepGroups | None = None  # of this step, if it is not undone but gone on with
        self._ranks: Ranks | None = None
        if process_group is not None:
            device = optimizer.param_groups[0]["params"][0].device
            self._ranks = Ranks(process_group, device, numbers=2)

    def __call__(self) -> None:
        """Steps once with the gradients in ``.grad``.

        Raises:
            StepDoesNotFitError: The step does not fit. Parameters, optimizer state, scale and
                random states are as before, on all ranks; gradients may be unscaled or clipped.
                If its ``partly`` is true, a fused optimizer has stepped some groups and could not
                step the others, or has stepped all and a hook after it does not fit (alike on all
                ranks): go on from a checkpoint.
            RanksError: Another rank failed with an error of its own.
        """
        self._groups = self._kept = None
        if self._ranks is None:
            self._step_alone()
        else:
            self._step_together(self._ranks)

    def _step_alone(self) -> None:
        if self._scaler is not None:
            # It works part by part: with several, one that failed may have left some unscaled.
            attempts = ATTEMPTS if len(parts_of(self._optimizer)) == 1 else 1
            self._survive("unscale_", partial(self._scaler.unscale_, self._optimizer), attempts)
        if self._max_norm is not None:
            self._clip(parts_of(self._optimizer), self._max_norm)
        guard = self._guard()
        if self._ranks is not None:
            guard = partial(self._keep, guard)
        self._survive("optimizer.step", self._step, guard=guard)
        if self._scaler is not None:
            self._survive("GradScaler.update", self._scaler.update)

    def _step_together(self, ranks: Ranks) -> None:
        """A step on every rank, or on none; each tries for itself, and then they agree."""
        failed: BaseException | None = None
        began, lost = time.perf_counter(), self.lost.seconds
        try:
            self._survive("the exchange between ranks", ranks.check_room)
            scale = None if self._scaler is None else self._scaler.state_dict()
            self._step_alone()
        except BaseException as error:
            failed = error
        before, self._kept = self._kept, None
        told, _ = ranks.tell(report(failed))
        worst = max(range(ranks.size), key=lambda rank: told[rank][0])
        outcome, asked = told[worst]
        if outcome == DONE:
            return
        if outcome in (PARTLY, DOES_NOT_FIT):
            # Partly done, all have their state and take what one rank has come to.
            if before is not None and outcome == DOES_NOT_FIT:
                if self._groups is not None:
                    self._groups.done.clear()  # what was stepped here is undone too
                before.restore()
            if self._scaler is None:
                ranks.take_from(worst, self._changed_in_place())
            elif failed is None and scale is not None:
                self._scaler.load_state_dict(scale)
            if failed is None:  # otherwise it is counted, as are own attempts before
                self.lost.add(began + self.lost.seconds - lost)
        undone = outcome == DOES_NOT_FIT and told[ranks.rank][0] == PARTLY  # by now
        raise elsewhere(worst, outcome, asked) if failed is None or undone else failed

    def _changed_in_place(self) -> list[torch.Tensor]:
        """What has no copy because a step that fails leaves it alone; one that ends does not."""
        if not steps_in_place(self._optimizer):
            return []
        changed: list[torch.Tensor] = []
        for p in parameters_with_gradients(self._optimizer):
            state = [
                t for t in self._optimizer.state.get(p, {}).values() if isinstance(t, torch.Tensor)
            ]
            changed += [p, *(t for t in state if t.device == p.device)]
        return changed

    def _keep(self, guard: Callable[[bool], _Snapshot], on_host: bool) -> _Snapshot:
        if self._kept is not None and self._groups is not None and self._groups.done:
            return self._kept  # what was stepped since could not be undone by another
        self._kept = None  # before another takes its place: there may be no room for both
        self._kept = guard(on_host)
        return self._kept

    def _guard(self) -> Callable[[bool], _Snapshot]:
        optimizer = self._optimizer
        parameters = parameters_with_gradients(optimizer)
        if self._scaler is None and not is_compiled(optimizer):
            fuses = self._ranks is None and steps_fused(optimizer)
            in_place = fuses or steps_in_place(optimizer)
            ready = in_place and has_its_state(optimizer, parameters) and groups_alike(optimizer)
            # The state of a later part is created when the first has already been stepped.
            by_groups = ready or (in_place and len(parts_of(optimizer)) <= 1)
            if by_groups or fuses:
                groups = self._groups = StepGroups(optimizer, fuse=fuses, noted=by_groups)
            if ready:
                return lambda on_host: CounterSnapshot(optimizer, groups.done)
            if by_groups:
                return partial(OptimizerSnapshot, optimizer, parameters, groups.done)
        return partial(OptimizerSnapshot, optimizer, parameters, None)

    def _clip(self, parts: list[list[torch.Tensor]], max_norm: float) -> None:
        grads = [p.grad for part in parts for p in part if p.grad is not None]
        norm = self._survive("clipping", partial(nn.utils.get_total_norm, grads))
        for part in parts:  # each is scaled in one operation, which happens or does not
            scale = partial(nn.utils.clip_grads_with_norm_, part, max_norm, norm)
            self._survive("clipping", scale)

    def _step(self) -> None:
        if self._scaler is not None:
            self._scaler.step(self._optimizer)
            return
        with nullcontext() if self._groups is None else self._groups.remaining():
            self._optimizer.step()

    def _survive(
        self,
        what: str,
        action: Callable[[], Any],
        attempts: int = ATTEMPTS,
        guard: Callable[[bool], _Snapshot] | None = None,
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
        done = [] if self._groups is None else groups_with_gradients(self._groups.done)
        groups = groups_with_gradients(self._optimizer.param_groups)
        stepped = f"{len(done)} of {len(groups)} groups" if done else ""
        raise does_not_fit(what, outcome, stepped=stepped)


def _attempt(action: Callable[[], Any], guard: Callable[[], _Snapshot] | None) -> Any:
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

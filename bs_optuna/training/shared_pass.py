"""The pass over a batch of which each of several ranks has a part: tried, agreed on, added up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from bs_optuna.science.regrowth import MicrobatchLimit
from bs_optuna.training.batches import Batch
from bs_optuna.training.cutting import Cutting
from bs_optuna.training.cutting import Plan
from bs_optuna.training.lost import Lost
from bs_optuna.training.pass_attempt import Agreement
from bs_optuna.training.pass_attempt import BackwardResult
from bs_optuna.training.pass_attempt import Outcome
from bs_optuna.training.pass_attempt import PassAttempt
from bs_optuna.training.pass_attempt import Report
from bs_optuna.training.ranks import SharedGradients
from bs_optuna.training.snapshot import StepSnapshot
from bs_optuna.training.weighted_pass import widened


_logger = logging.getLogger(__name__)

Snapshot = Callable[[Batch], StepSnapshot]
Run = Callable[[Plan, Batch, StepSnapshot], tuple[torch.Tensor, float]]


class SharedPass:
    """Runs this rank's part of a batch, with the microbatches that all ranks have agreed on.

    Args:
        group: A process group of ``torch.distributed``.
        modules: Alike on every rank.
        cutting: Makes microbatches of the part.
        limit: On a microbatch; told what all ranks came to, so that it is the same on each.
        lost: Counts what this rank has undone.
        scaler: Of the gradients.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        modules: Sequence[nn.Module],
        cutting: Cutting,
        limit: MicrobatchLimit,
        lost: Lost,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self._gradients = SharedGradients(group, modules, numbers=len(Report._fields))
        self._cutting = cutting
        self._limit = limit
        self._lost = lost
        self._scaler = scaler

    def __call__(self, batch: Batch, snapshot: Snapshot, run: Run) -> BackwardResult:
        """Adds the gradient of the whole batch to ``.grad``, or raises and leaves no trace.

        Args:
            batch: This rank's part.
            snapshot: The state before an attempt.
            run: Gives the loss of the part and what its mean is taken over.
        """
        tried: list[int] = []
        attempt, outcome = PassAttempt(), Outcome.SMALLER
        while True:
            began = time.perf_counter()
            self._try(attempt, batch, snapshot, run)
            agreed = self._agree(attempt)
            if outcome != Outcome.AGAIN:  # which had the same microbatch
                tried.append(agreed.largest)
            outcome = agreed.outcome
            rank = self._gradients.ranks.rank
            error = agreed.error(attempt, rank, tried, self._cutting.setting)
            if outcome == Outcome.DONE and error is None:
                agreed.tell(self._limit)
                return self._result(attempt, agreed, batch, tried)
            attempt.undo()
            if outcome not in (Outcome.DONE, Outcome.ERROR):
                self._lost.add(began)
            if error is not None:
                raise error
            agreed.tell(self._limit)
            same = attempt.plan if outcome == Outcome.AGAIN else None
            attempt = PassAttempt(attempt.cut, same)
            if same is None:
                limit = self._limit.value
                _logger.info("out of memory at %d on a rank; now at most %s", tried[-1], limit)

    def _try(self, attempt: PassAttempt, batch: Batch, snapshot: Snapshot, run: Run) -> None:
        """One pass over the part; where it failed, nothing is left of it."""
        try:
            if attempt.cut is None:
                attempt.cut = self._cutting.plans(batch)
                attempt.plan = self._limit.plan(attempt.cut)
            elif attempt.plan is None:
                attempt.plan = attempt.cut(self._limit.value)
            attempt.before = snapshot(batch)
            attempt.loss, attempt.held = run(attempt.plan, batch, attempt.before)
            self._prepare(attempt)
            return
        except BaseException as error:
            failed = error
        # Outside the except block: inside, its traceback would keep the activations alive.
        attempt.judge(failed)

    def _prepare(self, attempt: PassAttempt) -> None:
        """Allocates and reads all that is needed once the ranks have agreed."""
        assert attempt.loss is not None
        # The result's own, to be written to, and of the same type where ranks cut differently.
        attempt.loss = widened(attempt.loss.clone())
        attempt.loss_value = float(attempt.loss)
        attempt.scale = 1.0 if self._scaler is None else self._scaler.get_scale()
        attempt.trainable = self._gradients.trainable()
        attempt.had = self._gradients.settle()
        self._gradients.ranks.check_room()

    def _agree(self, attempt: PassAttempt) -> Agreement:
        had = attempt.had or [0.0] * self._gradients.parameters
        told, had = self._gradients.ranks.tell(attempt.report(self._limit), had)
        return Agreement([Report(*numbers) for numbers in told], had)

    def _result(
        self, attempt: PassAttempt, agreed: Agreement, batch: Batch, tried: list[int]
    ) -> BackwardResult:
        assert attempt.loss is not None
        shares = agreed.shares(self._cutting.reduction)
        mine = shares[self._gradients.ranks.rank]
        self._gradients.add_up(agreed.had, mine)
        attempt.keep(mine, batch)
        attempt.loss.fill_(agreed.loss(shares))
        return BackwardResult(
            loss=attempt.loss,
            batch_size=agreed.batch_size,
            microbatch_size=agreed.microbatch_size,
            accumulation_steps=agreed.accumulation_steps,
            sizes_tried=tuple(tried),
        )

"""What one attempt at the gradient of a batch came to: on this rank, and on all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from enum import IntEnum
from typing import Any
from typing import NamedTuple
from typing import cast

import optree
import torch

from bs_optuna.errors import RanksError
from bs_optuna.science.accumulation import weights
from bs_optuna.science.regrowth import MicrobatchLimit
from bs_optuna.training.batches import Batch
from bs_optuna.training.cutting import Plan
from bs_optuna.training.normalization import needs_two_samples
from bs_optuna.training.onednn import give_up_onednn
from bs_optuna.training.oom import BATCH_NORM
from bs_optuna.training.oom import OutOfMemory
from bs_optuna.training.oom import classify
from bs_optuna.training.oom import does_not_fit
from bs_optuna.training.oom import empty_caches
from bs_optuna.training.oom import release
from bs_optuna.training.snapshot import StepSnapshot


@dataclass(frozen=True)
class BackwardResult:
    """What one call of AccumulatedBackward did.

    Attributes:
        loss: Loss of the whole batch, a detached scalar on the device of the loss. It is of the
            loss's own type where the batch was not split; the losses of several microbatches or
            ranks are summed in at least single precision.
        batch_size: Samples in the batch, over all ranks.
        microbatch_size: Samples in the largest microbatch that was run, on any rank.
        accumulation_steps: Microbatches that the batch was cut into, or the largest part of it
            that a rank had.
        sizes_tried: Microbatch sizes of this call in order, in elements under a budget of them;
            all but the last ran out of memory.
    """

    loss: torch.Tensor
    batch_size: int
    microbatch_size: int
    accumulation_steps: int
    sizes_tried: tuple[int, ...]

    @classmethod
    def of(cls, plan: Plan, loss: torch.Tensor, tried: Sequence[int]) -> BackwardResult:
        """Of a plan that has run after others were tried."""
        return cls(
            loss=loss,
            batch_size=plan.batch_size,
            microbatch_size=plan.microbatch_size,
            accumulation_steps=plan.accumulation_steps,
            sizes_tried=tuple(tried),
        )

    @property
    def backoffs(self) -> int:
        """How often a smaller microbatch was tried in this call."""
        return len(self.sizes_tried) - 1


class Outcome(IntEnum):
    """How an attempt ended; of several ranks the worst counts."""

    DONE = 0
    AGAIN = 1  # it ran out of memory, and what failed will not be used any more
    SMALLER = 2  # it ran out of memory, and the next one can do with less
    DOES_NOT_FIT = 3
    ALONE = 4  # BatchNorm refuses the single sample of a microbatch
    LOST = 5  # it ran out of memory in a way that leaves the device unusable
    ERROR = 6


class Report(NamedTuple):
    """What a rank tells the others: numbers alone, as a collective carries them."""

    outcome: float
    limit: float  # on a microbatch of the next attempt; infinity is the whole part
    tried: float = 0.0  # the limit of this attempt if that was more than what is thought to fit
    batch_size: float = 0.0  # of this rank's part
    microbatch_size: float = 0.0
    largest: float = 0.0  # microbatch, in the unit of the limit
    accumulation_steps: float = 0.0
    held: float = 0.0  # what the mean loss of its part is taken over
    loss: float = 0.0
    scale: float = 1.0  # of the gradients
    bytes_requested: float = -1.0  # unknown
    trainable: float = 0.0  # fingerprint of the parameters that are trained


def _incomplete(before: StepSnapshot | None) -> RuntimeError | None:
    try:
        if before is not None:
            before.check_complete()
    except RuntimeError as error:
        return error
    return None


@dataclass
class PassAttempt:
    """What one rank did in an attempt; until it is kept, ``undo`` leaves nothing of it."""

    cut: Callable[[int | None], Plan] | None = None
    plan: Plan | None = None
    before: StepSnapshot | None = None
    loss: torch.Tensor | None = None
    held: float = 0.0
    loss_value: float = 0.0  # this and the next three are for the other ranks alone
    scale: float = 1.0
    trainable: int = 0
    had: list[float] = field(default_factory=list)  # 1 for each parameter with a gradient
    verdict: OutOfMemory | None = None
    error: BaseException | None = None
    again: bool = False  # with the same microbatch: what failed will not be used any more

    def undo(self) -> None:
        """Puts everything back to what it was before the attempt."""
        if self.before is not None:
            self.before.restore()
            self.before = None

    def keep(self, share: float, batch: Batch) -> None:
        """Keeps the gradients, which the ranks have added up; those of the batch are still ours.

        Args:
            share: The weight of this rank in the whole batch.
            batch: The pytree of tensors that this rank trained on.
        """
        assert self.before is not None
        for leaf in cast(list[torch.Tensor], optree.tree_leaves(cast(Any, batch))):
            if leaf.is_leaf and leaf.requires_grad and leaf.grad is not None:
                leaf.grad.mul_(share)
        self.before.commit()
        self.before.finish()

    def judge(self, error: BaseException) -> None:
        """Says what the error means and undoes the attempt; call it outside the except block."""
        self.verdict = classify(error)
        split = self.plan is not None and self.plan.accumulation_steps > 1
        if self.verdict is None and split and needs_two_samples(error):
            self.verdict = OutOfMemory(BATCH_NORM, None, False, str(error))
        if self.verdict is None or self.plan is None:  # without a cut there is nothing smaller
            self.error = error
        else:
            release(error)
        before = self.before
        try:
            self.undo()
        except Exception as incomplete:  # the others wait to be told
            self.error = self.error or incomplete
        if self.error is None and self.verdict is not None:
            self.error = _incomplete(before)
            empty_caches()
            self.again = give_up_onednn(self.verdict)

    def report(self, limit: MicrobatchLimit) -> Report:
        """The report of this attempt, which was planned by ``limit``."""
        outcome = Outcome.DONE
        next_limit = math.inf if limit.value is None else float(limit.value)
        plan, verdict = self.plan, self.verdict
        if self.error is not None or plan is None:
            return Report(Outcome.ERROR, next_limit)
        if self.again:
            outcome = Outcome.AGAIN
        elif verdict is not None and verdict.kind == BATCH_NORM:
            outcome = Outcome.ALONE
        elif verdict is not None and not verdict.retryable:
            outcome = Outcome.LOST
        elif verdict is not None and plan.microbatch_size == 1:
            outcome = Outcome.DOES_NOT_FIT
        elif verdict is not None:
            outcome, next_limit = Outcome.SMALLER, float(plan.halved().microbatch_limit)
        asked = None if verdict is None else verdict.bytes_requested
        return Report(
            outcome,
            next_limit,
            tried=plan.microbatch_limit if limit.tries else 0.0,
            batch_size=plan.batch_size,
            microbatch_size=plan.microbatch_size,
            largest=plan.largest,
            accumulation_steps=plan.accumulation_steps,
            held=self.held,
            loss=self.loss_value,
            scale=self.scale,
            bytes_requested=-1.0 if asked is None else float(asked),
            trainable=self.trainable,
        )


class Agreement:
    """What the reports of all ranks mean together; the same on every rank.

    Args:
        reports: One for each rank.
        had: On how many ranks each parameter had a gradient.
    """

    def __init__(self, reports: Sequence[Report], had: Sequence[float] = ()) -> None:
        self._reports = reports
        self.had = had
        self.outcome = Outcome(int(max(r.outcome for r in reports)))
        limit = min(r.limit for r in reports)
        self.limit = None if math.isinf(limit) else int(limit)
        self.tried = int(max(r.tried for r in reports)) or None
        self.batch_size = int(sum(r.batch_size for r in reports))
        self.microbatch_size = int(max(r.microbatch_size for r in reports))
        self.largest = int(max(r.largest for r in reports))
        self.accumulation_steps = int(max(r.accumulation_steps for r in reports))

    def tell(self, limit: MicrobatchLimit) -> None:
        """Tells a rank's limit what came out, so that all ranks shrink and grow back together."""
        if self.outcome == Outcome.DONE:
            limit.hold(self.tried)
        elif self.outcome == Outcome.SMALLER and self.tried is not None:
            limit.give_way()
        elif self.outcome == Outcome.SMALLER:
            limit.shrink(self.limit)

    def shares(self, reduction: str) -> tuple[float, ...]:
        """The weight of each rank's loss and gradients in those of the whole batch."""
        if reduction == "sum":
            return (1.0,) * len(self._reports)
        return weights([r.held for r in self._reports])

    def loss(self, shares: Sequence[float]) -> float:
        """The loss of the whole batch."""
        return sum(w * r.loss for w, r in zip(shares, self._reports, strict=True))

    def error(
        self, attempt: PassAttempt, rank: int, tried: list[int], setting: str
    ) -> BaseException | None:
        """What a rank has to raise for its attempt, or None where the training goes on."""
        if attempt.error is not None:
            return attempt.error
        failed = next(i for i, r in enumerate(self._reports) if r.outcome == self.outcome)
        if self.outcome == Outcome.ERROR:
            return RanksError(
                f"Rank {failed} failed with an error of its own, which it raises; this rank has "
                "undone its part of the step. Mend that error and start all ranks again."
            )
        if self.outcome in (Outcome.DOES_NOT_FIT, Outcome.ALONE, Outcome.LOST):
            return self._does_not_fit(attempt, rank, failed, tried, setting)
        if self.outcome == Outcome.DONE:
            return self._difference()
        return None

    def _does_not_fit(
        self, attempt: PassAttempt, rank: int, failed: int, tried: list[int], setting: str
    ) -> Exception:
        report = self._reports[failed]
        verdict = attempt.verdict if rank == failed else None
        if verdict is None:
            asked = None if report.bytes_requested < 0 else int(report.bytes_requested)
            kind = BATCH_NORM if self.outcome == Outcome.ALONE else f"rank {failed}"
            verdict = OutOfMemory(kind, asked, self.outcome != Outcome.LOST, "")
        # The others may have had more in a microbatch.
        return does_not_fit(verdict, [*tried[:-1], int(report.largest)], setting)

    def _difference(self) -> Exception | None:
        if len(scales := {r.scale for r in self._reports}) > 1:
            return RanksError(
                f"The ranks scale their gradients by {sorted(scales)}; give each a GradScaler "
                "with the same settings and update it in the same steps."
            )
        if len({r.trainable for r in self._reports}) > 1:
            return RanksError(
                "The ranks train different parameters; set requires_grad alike on every rank."
            )
        if sum(r.held for r in self._reports) <= 0:
            return ValueError(
                "count is 0 on every rank; must be positive on one: a batch without any target has "
                "no mean loss."
            )
        return None

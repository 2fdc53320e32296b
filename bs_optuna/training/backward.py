"""AccumulatedBackward: the gradient of the whole batch, in whatever memory there is.

B: samples in the batch; b_j: samples in microbatch j; w_j: weight of microbatch j, sum(w_j) = 1;
gradient = sum_j w_j * gradient of the mean loss of microbatch j.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from bs_optuna.science.accumulation import AccumulationPlan
from bs_optuna.science.accumulation import weights
from bs_optuna.training.attempt import Agreement
from bs_optuna.training.attempt import Attempt
from bs_optuna.training.attempt import BackwardResult
from bs_optuna.training.attempt import Outcome
from bs_optuna.training.attempt import Report
from bs_optuna.training.batches import Batch
from bs_optuna.training.batches import batch_length
from bs_optuna.training.batches import call_model
from bs_optuna.training.batches import moved
from bs_optuna.training.batches import take
from bs_optuna.training.normalization import WholeBatchStatistics
from bs_optuna.training.normalization import splits_batch_norm
from bs_optuna.training.onednn import working_onednn
from bs_optuna.training.ranks import SharedGradients
from bs_optuna.training.ranks import refuse_wrapped
from bs_optuna.training.snapshot import StepSnapshot
from bs_optuna.training.snapshot import draws_foreign


_logger = logging.getLogger(__name__)

LossFunction = Callable[[Any, Any], torch.Tensor]


class AccumulatedBackward:
    """Fills ``.grad`` with the gradient of the whole batch, halving the microbatch until it fits.

    A call runs forward and backward on one microbatch after the other and weighs each by what its
    mean is taken over, so that the sum is the gradient of ``loss_fn(model(inputs), targets)`` on
    the whole batch. When memory runs out the attempt is undone (gradients, buffers such as
    BatchNorm statistics, random states), the microbatch is halved and the same batch is done again:
    the result is bit for bit that of a call that had the smaller microbatch from the start. Zeroing
    gradients, clipping and the optimizer's step stay with the caller.

    On a CPU oneDNN may run out of memory in a way that spoils it for its thread. The step is then
    done again without it, which rounds otherwise, and so are all later ones in that thread.

    A batch may be on another device than the model, for instance in the memory of the host: each
    microbatch is moved to the model when its turn comes.

    What microbatches cannot do: BatchNorm normalizes each microbatch by its own statistics, which a
    warning says once (see ``batch_norm``), and a loss that couples samples (in-batch negatives) is
    another loss on a part of the batch.

    Args:
        model: Called as ``model(inputs)``, ``model(*inputs)`` for a tuple and ``model(**inputs)``
            for a dict.
        loss_fn: Called as ``loss_fn(outputs, targets)``; returns a scalar. Its parameters and
            buffers are looked after too if it is a module.
        microbatch_size: ``"auto"`` starts with the whole batch; a number starts there. It only
            shrinks, and the next call starts where the last one ended.
        reduction: ``"mean"`` if the loss is a mean over samples or tokens, or ``"sum"``.
        count: With ``reduction="mean"``: what the mean of a microbatch is taken over, as
            ``count(inputs, targets)``, if that is not its samples; for instance the target tokens
            that are not padding.
        scaler: A ``torch.amp.GradScaler``; the gradients are then scaled by it, and unscaling
            before clipping is the caller's, as always.
        autocast_dtype: Runs model and loss under ``torch.autocast`` with this type.
        batch_norm: With ``"exact"`` a split batch updates the running statistics of BatchNorm once,
            to what the values of all its microbatches say together. Within the step each
            microbatch is still normalized by its own statistics, so gradients, and the values
            that reach a BatchNorm behind another one, are not those of the whole batch;
            `convert_batch_norm` takes BatchNorm out altogether.
        process_group: Trains on several ranks, such as ``dist.group.WORLD``: each calls with its
            own part of the batch, and all end with the gradient of the whole. Where one runs out
            of memory all do the step again. See `SharedGradients` for what becomes of the model.

    Example:
        >>> backward = AccumulatedBackward(model, loss_fn, microbatch_size="auto")
        >>> for inputs, targets in loader:
        ...     optimizer.zero_grad()
        ...     result = backward(inputs, targets)
        ...     optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        *,
        microbatch_size: int | Literal["auto"] = "auto",
        reduction: Literal["mean", "sum"] = "mean",
        count: Callable[[Any, Any], int | torch.Tensor] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        autocast_dtype: torch.dtype | None = None,
        batch_norm: Literal["microbatch", "exact"] = "microbatch",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if microbatch_size != "auto" and microbatch_size < 1:
            raise ValueError(
                f"microbatch_size={microbatch_size}; must be at least 1, or 'auto' to find it."
            )
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction={reduction!r}; must be 'mean' or 'sum'.")
        if reduction == "sum" and count is not None:
            raise ValueError("count is for reduction='mean' only; a sum needs no weights.")
        if batch_norm not in ("microbatch", "exact"):
            raise ValueError(f"batch_norm={batch_norm!r}; must be 'microbatch' or 'exact'.")
        refuse_wrapped(model)
        self._modules = [m for m in (model, loss_fn) if isinstance(m, nn.Module)]
        self._model = model
        self._loss_fn = loss_fn
        self._limit = None if microbatch_size == "auto" else microbatch_size
        self._reduction = reduction
        self._count = count
        self._scaler = scaler
        self._autocast_dtype = autocast_dtype
        self._exact_batch_norm = batch_norm == "exact"
        self._warned = self._exact_batch_norm  # that microbatches change BatchNorm
        devices = {p.device for module in self._modules for p in module.parameters()}
        self._device = devices.pop() if len(devices) == 1 else None
        self._foreign = draws_foreign(model, loss_fn)
        self._buffer_copies: dict[tuple[int, str], torch.Tensor] = {}
        if scaler is not None:
            # It makes its tensors in the first use, and one that failed there stays half made.
            scaler.scale(torch.zeros((), device=next(model.parameters()).device))
        self._shared: SharedGradients | None = None
        if process_group is not None:
            numbers = len(Report._fields)
            self._shared = SharedGradients(process_group, self._modules, numbers=numbers)

    @property
    def microbatch_size(self) -> int | None:
        """Most samples that the next call puts into a microbatch; None is the whole batch."""
        return self._limit

    def __call__(self, inputs: Any, targets: Any = None) -> BackwardResult:
        """Adds the gradient of the whole batch to ``.grad``.

        Args:
            inputs: Any pytree of tensors whose first dimension is the sample.
            targets: Likewise, or None if the loss needs none.

        Raises:
            MicrobatchDoesNotFitError: Not even one sample fits; gradients, buffers and random
                states are as they were before the call.
            ValueError: The tensors of the batch differ in their number of samples, or there is
                nothing that a mean could be taken over.
            TypeError: The batch holds something that cannot be cut into microbatches.
            RanksError: Another rank failed with an error of its own, or the ranks differ.
        """
        batch = (inputs, targets)
        tried: list[int] = []
        while True:
            attempt = self._attempt(batch)
            agreed = self._agree(attempt)
            if agreed.microbatch_size not in tried[-1:]:
                tried.append(agreed.microbatch_size)
            if (error := agreed.error(attempt, tried)) is not None:
                attempt.undo()
                raise error
            if agreed.outcome == Outcome.DONE:
                return self._result(attempt, agreed, batch, tried)
            attempt.undo()
            if agreed.limit != self._limit:
                _logger.info("out of memory at %d samples; now %s", tried[-1], agreed.limit)
            self._limit = agreed.limit

    def _warn(self, plan: AccumulationPlan) -> None:
        if self._warned or (plan.accumulation_steps == 1 and self._shared is None):
            return
        self._warned = True
        if splits_batch_norm(self._modules):
            whole = "the whole batch" if self._shared else f"the batch of {plan.batch_size}"
            warnings.warn(
                f"BatchNorm normalizes each microbatch of {plan.microbatch_size} samples by its "
                f"own statistics instead of those of {whole}. Replace it "
                "before training with bs_optuna.training.convert_batch_norm(model), or pass "
                "batch_norm='exact' to keep at least its running statistics those of the batch.",
                stacklevel=4,
            )

    def _attempt(self, batch: Batch) -> Attempt:
        """One pass over the batch; where it failed, nothing is left of it."""
        attempt = Attempt()
        try:
            n = batch_length(batch)
            attempt.plan = AccumulationPlan(n, min(self._limit or n, n))
            self._warn(attempt.plan)
            attempt.before = StepSnapshot(
                self._modules, batch, buffer_copies=self._buffer_copies, foreign=self._foreign
            )
            with working_onednn():
                attempt.loss, attempt.held = self._run(attempt.plan, batch)
            if self._shared is None:
                attempt.before.commit()
            else:
                self._prepare(attempt, self._shared)
            return attempt
        except BaseException as error:
            failed = error
        # Outside the except block: inside, its traceback would keep the activations alive.
        attempt.judge(failed)
        return attempt

    def _prepare(self, attempt: Attempt, shared: SharedGradients) -> None:
        """Allocates and reads all that is needed once the ranks have agreed."""
        assert attempt.loss is not None
        attempt.loss = attempt.loss.clone()  # the result's own, to be written to
        attempt.loss_value = float(attempt.loss)
        attempt.scale = 1.0 if self._scaler is None else self._scaler.get_scale()
        attempt.trainable = shared.trainable()
        attempt.had = shared.settle()
        shared.ranks.check_room()

    def _agree(self, attempt: Attempt) -> Agreement:
        mine = attempt.report(self._limit)
        if self._shared is None:
            return Agreement([mine])
        had = attempt.had or [0.0] * self._shared.parameters
        told, had = self._shared.ranks.tell(mine, had)
        return Agreement([Report(*numbers) for numbers in told], had)

    def _result(
        self, attempt: Attempt, agreed: Agreement, batch: Batch, tried: list[int]
    ) -> BackwardResult:
        assert attempt.loss is not None
        if self._shared is not None:
            shares = agreed.shares(self._reduction)
            mine = shares[self._shared.ranks.rank]
            self._shared.add_up(agreed.had, mine)
            attempt.keep(mine, batch)
            attempt.loss.fill_(agreed.loss(shares))
        return BackwardResult(
            loss=attempt.loss,
            batch_size=agreed.batch_size,
            microbatch_size=agreed.microbatch_size,
            accumulation_steps=agreed.accumulation_steps,
            sizes_tried=tuple(tried),
        )

    def _run(self, plan: AccumulationPlan, batch: Batch) -> tuple[torch.Tensor, float]:
        """The loss of the batch, and what its mean is taken over."""
        if plan.accumulation_steps == 1 and self._count is None:
            return self._accumulated(batch, 1.0), plan.batch_size
        parts = [batch]
        if plan.accumulation_steps > 1:
            parts = [take(batch, part) for part in plan.slices]  # views, not copies
        counts = self._counts(parts, plan)
        if self._shared is not None and not any(counts):  # the other ranks may have targets
            return torch.zeros((), device=self._device), 0.0
        total: torch.Tensor | None = None
        exact = self._exact_batch_norm and len(parts) > 1
        statistics = WholeBatchStatistics(self._modules if exact else ())
        even = (1.0,) * len(parts)
        shares = even if self._reduction == "sum" else weights(counts)
        for weight, part in zip(shares, parts, strict=True):
            if weight == 0:  # the mean over nothing is NaN, and would spoil the sum
                continue
            with statistics.microbatch():
                loss = self._accumulated(part, weight)
            total = loss if total is None else total + loss
        statistics.write()
        assert total is not None  # there is at least one target
        return total, sum(counts)

    def _accumulated(self, part: Batch, weight: float) -> torch.Tensor:
        loss = self._loss(part)
        if weight != 1.0:
            loss = loss * weight
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()
        return loss.detach()

    def _counts(self, parts: list[Batch], plan: AccumulationPlan) -> Sequence[float]:
        """What the mean loss of each part is taken over."""
        if self._count is None:
            return plan.sizes
        return [float(self._count(*part)) for part in parts]

    def _loss(self, part: Batch) -> torch.Tensor:
        inputs, targets = part if self._device is None else moved(part, self._device)
        if self._autocast_dtype is None:
            return self._loss_fn(call_model(self._model, inputs), targets)
        with torch.autocast(next(self._model.parameters()).device.type, dtype=self._autocast_dtype):
            return self._loss_fn(call_model(self._model, inputs), targets)

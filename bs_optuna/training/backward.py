"""AccumulatedBackward: the gradient of the whole batch, in whatever memory there is.

B: samples in the batch; b_j: samples in microbatch j; w_j: weight of microbatch j, sum(w_j) = 1;
gradient = sum_j w_j * gradient of the mean loss of microbatch j.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from bs_optuna.science.noise_scale import NoiseScale
from bs_optuna.science.regrowth import MicrobatchLimit
from bs_optuna.science.regrowth import Smaller
from bs_optuna.training.arguments import check_loss
from bs_optuna.training.arguments import check_model
from bs_optuna.training.arguments import check_noise_scale
from bs_optuna.training.arguments import check_sizes
from bs_optuna.training.batches import Batch
from bs_optuna.training.batches import plain
from bs_optuna.training.buffer_copies import BufferCopies
from bs_optuna.training.cutting import Count
from bs_optuna.training.cutting import Cutting
from bs_optuna.training.cutting import Lengths
from bs_optuna.training.cutting import Plan
from bs_optuna.training.cutting import Trim
from bs_optuna.training.gradient_norms import GradientNorms
from bs_optuna.training.lost import Lost
from bs_optuna.training.normalization import needs_two_samples
from bs_optuna.training.normalization import warn_of_split
from bs_optuna.training.onednn import give_up_onednn
from bs_optuna.training.onednn import working_onednn
from bs_optuna.training.oom import BATCH_NORM
from bs_optuna.training.oom import OutOfMemory
from bs_optuna.training.oom import classify
from bs_optuna.training.oom import does_not_fit
from bs_optuna.training.oom import empty_caches
from bs_optuna.training.oom import release
from bs_optuna.training.pass_attempt import BackwardResult
from bs_optuna.training.shared_pass import SharedPass
from bs_optuna.training.snapshot import StepSnapshot
from bs_optuna.training.snapshot import device_of
from bs_optuna.training.snapshot import draws_foreign
from bs_optuna.training.snapshot import parameters_of
from bs_optuna.training.snapshot import refuse_lazy
from bs_optuna.training.weighted_pass import LossFunction
from bs_optuna.training.weighted_pass import WeightedPass


_logger = logging.getLogger(__name__)


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
    microbatch is moved to the model when its turn comes. Inputs of which some are there already, as
    beside the lengths of a packed sequence, are left as they are; so are targets.

    What microbatches cannot do: BatchNorm normalizes each microbatch by its own statistics, which a
    warning says once (see ``batch_norm``), and a loss that couples samples (in-batch negatives) is
    another loss on a part of the batch.

    Args:
        model: Called as ``model(inputs)``, ``model(*inputs)`` for a tuple and ``model(**inputs)``
            for a dict. Like an optimizer this looks after the parameters that the model has now.
        loss_fn: Called as ``loss_fn(outputs, targets)``; returns a scalar. Its parameters and
            buffers are looked after too if it is a module. What a function trains that is in
            neither could not be undone: it is refused in the first call, or when memory runs out.
        microbatch_size: ``"auto"`` starts with the whole batch; a number starts there. The next
            call starts where the last one ended.
        reduction: ``"mean"`` if the loss is a mean over samples or tokens, or ``"sum"``.
        count: With ``reduction="mean"``: what the mean of a microbatch is taken over, as
            ``count(inputs, targets)``, if that is not its samples; for instance the target tokens
            that are not padding.
        scaler: A ``torch.amp.GradScaler``; the gradients are then scaled by it, and unscaling
            before clipping is the caller's, as always.
        autocast_dtype: Runs model and loss under ``torch.autocast`` with this type.
        batch_norm: With ``"exact"`` a split batch updates the running statistics of BatchNorm, and
            of an InstanceNorm that has some, once, to what all its values say together. Within the
            step each microbatch is still normalized by its own statistics, so gradients, and the
            values that reach a BatchNorm behind another one, are not those of the whole batch;
            `convert_batch_norm` takes BatchNorm out altogether.
        microbatch_tokens: For samples that vary in length: the most elements that a microbatch may
            hold, its samples times the longest of them, instead of a number of samples. Samples
            of like length go together, the microbatch with the most elements runs first, and what
            runs out of memory is halved. A longer sample runs alone.
        lengths: The length of each sample, as ``lengths(inputs, targets)``, for
            ``microbatch_tokens``; None takes the ``count`` of each sample.
        trim: Cuts the padding of a microbatch off, as ``trim(inputs, targets, longest)``, which
            returns both; None leaves that to the model and the loss.
        regrow_after: Calls without a failure before a microbatch that has shrunk is tried at twice
            its size, up to where it started; a try that fails is undone and doubles the wait. None
            never tries.
        smaller: Asked after each attempt that ran out of memory, as ``smaller(failed, half)``, for
            the size to go on with, at most ``half``; None halves. Not with ``process_group``.
        noise_scale: Takes in what each batch in several microbatches says of the gradient's noise,
            see `NoiseScale`; nothing is copied for it. A BatchNorm in training mode leaves nothing
            to read. Not with ``reduction="sum"`` or ``process_group``.
        process_group: Trains on several ranks, such as ``dist.group.WORLD``: each calls with its
            own part of the batch, and all end with the gradient of the whole. Where one runs out
            of memory all do the step again; they shrink and grow back together. Give each the
            same settings. See `SharedGradients` for what becomes of the model.

    Attributes:
        lost: What running out of memory has cost in all calls together; of several ranks, what
            this one has undone.
        warned: Whether it was said what microbatches change in BatchNorm; true keeps it silent.

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
        count: Count | None = None,
        scaler: torch.amp.GradScaler | None = None,
        autocast_dtype: torch.dtype | None = None,
        batch_norm: Literal["microbatch", "exact"] = "microbatch",
        microbatch_tokens: int | None = None,
        lengths: Lengths | None = None,
        trim: Trim | None = None,
        regrow_after: int | None = 64,
        smaller: Smaller | None = None,
        noise_scale: NoiseScale | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        check_model(model)
        check_loss(loss_fn, reduction)
        check_sizes(microbatch_size, microbatch_tokens)
        if batch_norm not in ("microbatch", "exact"):
            raise ValueError(f"batch_norm={batch_norm!r}; must be 'microbatch' or 'exact'.")
        if smaller is not None and process_group is not None:
            raise ValueError("smaller and process_group; give one: ranks agree among themselves.")
        check_noise_scale(noise_scale, reduction, process_group)
        self.lost = Lost()
        self._modules = [m for m in (model, loss_fn) if isinstance(m, nn.Module)]
        self._cutting = Cutting(
            reduction=reduction,
            count=count,
            microbatch_tokens=microbatch_tokens,
            lengths=lengths,
            trim=trim,
        )
        most = microbatch_tokens if microbatch_size == "auto" else microbatch_size
        self._limit = MicrobatchLimit(most, regrow_after=regrow_after, smaller=smaller)
        self.warned = batch_norm == "exact"
        self._parts = list({id(m): m for root in self._modules for m in root.modules()}.values())
        self._parameters = parameters_of(self._modules)
        refuse_lazy(self._modules)
        devices = {p.device for p in self._parameters}
        self._device_types = {device.type for device in devices}
        self._device = devices.pop() if len(devices) == 1 else None
        self._foreign = draws_foreign(model, loss_fn)
        self._buffers = BufferCopies(self._parts, all_copied=process_group is not None)
        if scaler is not None:
            # It makes its tensors in the first use, and one that failed there stays half made.
            scaler.scale(torch.zeros((), device=device_of(*self._modules)))
        self._noise_scale = noise_scale
        self._norms: GradientNorms | None = None
        if noise_scale is not None:
            self._norms = GradientNorms(self._modules, self._parameters, scaler=scaler)
        self._pass = WeightedPass(
            model,
            loss_fn,
            device=self._device,
            scaler=scaler,
            autocast_dtype=autocast_dtype,
            exact=self._modules if batch_norm == "exact" else (),
            norms=self._norms,
        )
        self._shared: SharedPass | None = None
        if process_group is not None:
            self._shared = SharedPass(
                process_group, self._modules, self._cutting, self._limit, self.lost, scaler
            )

    @property
    def microbatch_size(self) -> int | None:
        """Most samples that the next call puts into a microbatch; None is the whole batch."""
        return None if self._cutting.microbatch_tokens is not None else self._limit.value

    @property
    def microbatch_tokens(self) -> int | None:
        """Most elements that the next call puts into a microbatch; None without such a budget."""
        return None if self._cutting.microbatch_tokens is None else self._limit.value

    def __call__(self, inputs: Any, targets: Any = None) -> BackwardResult:
        """Adds the gradient of the whole batch to ``.grad``, in the tensors that are there.

        Args:
            inputs: Any pytree of tensors whose first dimension is the sample. Those that require
                grad must be leaves, and get it in their ``.grad``.
            targets: Likewise, or None if the loss needs none.

        Raises:
            MicrobatchDoesNotFitError: Not even one sample fits; gradients, buffers and random
                states are as they were before the call.
            ValueError: The tensors of the batch differ in their number of samples, one of them was
                computed with gradients, there is nothing that a mean could be taken over, or the
                loss trains a parameter that neither model nor loss function holds.
            TypeError: The batch holds something that cannot be cut into microbatches.
            RanksError: Another rank failed with an error of its own, or the ranks differ.
        """
        batch = (plain(inputs), plain(targets))
        if self._shared is not None:
            return self._shared(batch, self._snapshot, self._run_part)
        cut = self._cutting.plans(batch)
        plan = self._limit.plan(cut)
        tried = [plan.largest]
        while True:
            if plan.accumulation_steps > 1 and not self.warned:
                self.warned = True
                warn_of_split(self._modules, plan.microbatch_size, plan.batch_size, stacklevel=2)
            began = time.perf_counter()
            outcome = self._attempt(plan, batch)
            if isinstance(outcome, torch.Tensor):
                self._limit.succeeded(plan)
                return BackwardResult.of(plan, outcome, tried)
            empty_caches()
            self.lost.add(began)
            if give_up_onednn(outcome):
                continue
            # The one with the most elements comes first; no limit makes less of a single sample.
            first = self._pass.left == plan.accumulation_steps and not self._limit.tries
            alone = first and plan.sizes[0] == 1
            if plan.microbatch_size == 1 or alone or not outcome.retryable:
                raise does_not_fit(outcome, tried, self._cutting.setting)
            plan = self._limit.failed(plan, cut)
            tried.append(plan.largest)
            _logger.info("out of memory at %s=%d; now %d", self._cutting.setting, *tried[-2:])

    def _attempt(self, plan: Plan, batch: Batch) -> torch.Tensor | OutOfMemory:
        """The loss of the batch, or what ran out; then nothing is left of the attempt."""
        before = None
        self._pass.left = 0  # before it begins
        try:
            before = self._snapshot(batch)
            with working_onednn():
                split = plan.accumulation_steps > 1
                microbatches = self._cutting.microbatches(plan, batch)[0]
                loss = self._pass(microbatches, before, split=split)
                reading = self._norms.reading(plan.batch_size) if self._norms and split else None
            before.commit()
        except BaseException as error:
            failed = error
        else:
            before.finish()
            if reading is not None and self._noise_scale is not None:
                self._noise_scale.add(reading)
            return loss
        # Outside the except block: inside, its traceback would keep the activations alive.
        verdict = classify(failed)
        if verdict is None and plan.accumulation_steps > 1 and needs_two_samples(failed):
            verdict = OutOfMemory(BATCH_NORM, None, False, str(failed))
        if verdict is not None:
            release(failed)
        if verdict is None:
            try:
                if before is not None:
                    before.restore()
            except Exception as lost:  # perhaps of a device that answers nothing any more
                failed.add_note(f"What the pass had changed is not all put back: {lost}")
            raise failed
        if before is None:
            return replace(verdict, kind=f"{verdict.kind}, for copies of the buffers")
        before.restore()
        before.check_complete()
        return verdict

    def _snapshot(self, batch: Batch) -> StepSnapshot:
        return StepSnapshot(
            self._parts,
            self._parameters,
            batch,
            buffers=self._buffers,
            device_types=self._device_types,
            foreign=self._foreign,
        )

    def _run_part(
        self, plan: Plan, batch: Batch, before: StepSnapshot
    ) -> tuple[torch.Tensor, float]:
        """The loss of one rank's part of the batch, and what its mean is taken over."""
        if not self.warned:  # by the part alone, also where that is not cut
            self.warned = True
            warn_of_split(self._modules, plan.microbatch_size, None, stacklevel=5)
        with working_onednn():
            microbatches, held = self._cutting.microbatches(plan, batch, whole=False)
            if not microbatches:  # the other ranks may have targets
                return torch.zeros((), device=self._device), 0.0
            return self._pass(microbatches, before, split=plan.accumulation_steps > 1), held

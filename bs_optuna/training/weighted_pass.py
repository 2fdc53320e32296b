"""Forward and backward over the microbatches of one batch, each weighed by its part of it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from bs_optuna.training.batches import Batch
from bs_optuna.training.batches import call_model
from bs_optuna.training.batches import moved
from bs_optuna.training.foreign_leaves import ForeignLeaves
from bs_optuna.training.gradient_norms import GradientNorms
from bs_optuna.training.normalization import WholeBatchStatistics
from bs_optuna.training.snapshot import StepSnapshot
from bs_optuna.training.snapshot import device_of


LossFunction = Callable[[Any, Any], torch.Tensor]


class WeightedPass:
    """See `AccumulatedBackward` for what the arguments mean.

    Args:
        model: Called on the inputs.
        loss_fn: Called on its outputs and the targets.
        device: Where microbatches are moved to; None leaves them where they are.
        scaler: Of the gradients.
        autocast_dtype: Of model and loss, if it is another than that of their parameters.
        exact: The modules whose running statistics are to be those of the whole batch.
        norms: Measures the gradients of microbatches; None leaves them unmeasured.

    Attributes:
        left: Microbatches of this pass that are not done yet.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        *,
        device: torch.device | None,
        scaler: torch.amp.GradScaler | None,
        autocast_dtype: torch.dtype | None,
        exact: Sequence[nn.Module],
        norms: GradientNorms | None,
    ) -> None:
        self._model = model
        self._loss_fn = loss_fn
        self._device = device
        self._scaler = scaler
        self._autocast_dtype = autocast_dtype
        self._device_type = device_of(model, loss_fn).type
        self._exact = exact
        self._norms = norms
        self._foreign = ForeignLeaves()
        self.left = 0

    def __call__(
        self, microbatches: list[tuple[float, Batch]], before: StepSnapshot, *, split: bool
    ) -> torch.Tensor:
        """Adds the gradients up and returns the loss of all, detached.

        Args:
            microbatches: Each after its weight.
            before: What the attempt can be undone by.
            split: Whether they are parts of one batch; then the losses are summed in at least
                single precision, of which lower ones would lose most.

        Raises:
            ValueError: The loss trains what ``before`` does not know.
        """
        self.left = len(microbatches)
        try:
            return self._total(microbatches, before, split)
        except BaseException:
            self._foreign.forget()
            raise

    def _total(
        self, microbatches: list[tuple[float, Batch]], before: StepSnapshot, split: bool
    ) -> torch.Tensor:
        if not split:
            return self._accumulated(*microbatches[0], before).detach()
        total: torch.Tensor | None = None
        statistics = WholeBatchStatistics(self._exact)
        trains = False
        with nullcontext() if self._norms is None else self._norms.watching():
            for weight, part in microbatches:
                if self._norms is not None:
                    self._norms.microbatch(weight)
                with statistics.microbatch():
                    loss = self._accumulated(weight, part, before, split=True)
                trains |= loss.requires_grad
                loss = widened(loss.detach()) * weight
                total = loss if total is None else total + loss
        statistics.write()
        assert total is not None  # there is at least one target
        if not trains:
            total.backward()  # says so as it does for the whole batch
        return total

    def _accumulated(
        self, weight: float, part: Batch, before: StepSnapshot, *, split: bool = False
    ) -> torch.Tensor:
        loss = self._loss(part)
        if not isinstance(loss, torch.Tensor):
            raise TypeError(
                f"The loss function returned a {type(loss).__name__}; must return one number as a "
                "tensor, and nothing else: the mean over the samples, such as losses.mean()."
            )
        if loss.requires_grad or not split:  # else it is constant, in this part of the batch
            self._foreign.check(loss, before)
            weighted = loss if weight == 1.0 else loss * weight
            (weighted if self._scaler is None else self._scaler.scale(weighted)).backward()
        self.left -= 1
        return loss

    def _loss(self, part: Batch) -> torch.Tensor:
        inputs, targets = part if self._device is None else moved(part, self._device)
        if self._autocast_dtype is None:
            return self._loss_fn(call_model(self._model, inputs), targets)
        with torch.autocast(self._device_type, dtype=self._autocast_dtype):
            return self._loss_fn(call_model(self._model, inputs), targets)


def widened(loss: torch.Tensor) -> torch.Tensor:
    """A loss in at least single precision."""
    return loss.to(torch.promote_types(loss.dtype, torch.float32))

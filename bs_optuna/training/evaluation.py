"""Means of the loss and the metrics over a data set, in pieces that fit into memory."""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager

import torch
from torch import nn

from bs_optuna.errors import MicrobatchDoesNotFitError
from bs_optuna.errors import TaskError
from bs_optuna.training.batches import batch_length
from bs_optuna.training.batches import call_model
from bs_optuna.training.batches import moved
from bs_optuna.training.cutting import counted
from bs_optuna.training.data import Data
from bs_optuna.training.data import evaluation_batches
from bs_optuna.training.data import length
from bs_optuna.training.lost import Lost
from bs_optuna.training.means import judged
from bs_optuna.training.modes import evaluating
from bs_optuna.training.onednn import give_up_onednn
from bs_optuna.training.onednn import working_onednn
from bs_optuna.training.oom import OutOfMemory
from bs_optuna.training.oom import classify
from bs_optuna.training.oom import empty_caches
from bs_optuna.training.oom import release
from bs_optuna.training.snapshot import RandomStates
from bs_optuna.training.snapshot import device_of
from bs_optuna.training.task import TrainingTask


_logger = logging.getLogger(__name__)


SMALLEST_EVALUATION_BATCH = 256


def largest_piece(microbatch_size: int, fitting: int | None) -> int:
    """Samples in a piece to begin with: twice those of a microbatch, and of a small one more.

    Args:
        microbatch_size: Samples in a microbatch of training.
        fitting: Most that are thought to fit; None where nothing is known.
    """
    pieces = max(2 * microbatch_size, SMALLEST_EVALUATION_BATCH)
    return pieces if fitting is None else max(1, min(pieces, fitting))


class Evaluation:
    """Evaluates a model; halves its pieces when memory runs out, and leaves training's alone.

    Warns of a loss or metric that is no mean, whose value depends on the size of the pieces.

    Args:
        task: Gives loss, metrics and what their means are taken over.
        batch_size: Samples in a piece, to begin with.

    Attributes:
        batch_size: Samples in a piece, now.
        lost: What running out of memory has cost in all evaluations together.
    """

    def __init__(self, task: TrainingTask, *, batch_size: int) -> None:
        self.lost = Lost()
        self._task = task
        self.batch_size = batch_size
        self._judged = False  # whether loss and metrics are means

    def __call__(
        self, model: nn.Module, data: Data, *, within: AbstractContextManager[object]
    ) -> dict[str, float]:
        """The mean loss, as ``"loss"``, and the mean of each metric.

        Args:
            model: Put into evaluation mode meanwhile, as a loss that is a module.
            data: What to evaluate on.
            within: Entered around the evaluation: the limit on memory.

        Raises:
            MicrobatchDoesNotFitError: One sample does not fit.
        """
        tried = [self.batch_size]
        before = RandomStates({device_of(model, self._task.loss).type})
        while True:
            began = time.perf_counter()
            outcome = self._attempt(model, data, within)
            if isinstance(outcome, dict):
                return outcome
            before.restore()  # the order of the training data, say, does not depend on memory
            empty_caches()
            self.lost.add(began)
            if give_up_onednn(outcome):
                continue
            self.batch_size = min(self.batch_size, length(data))
            if self.batch_size == 1 or not outcome.retryable:
                raise MicrobatchDoesNotFitError(
                    f"Out of memory ({outcome.kind}) in evaluation with pieces of "
                    f"{self.batch_size}; use a smaller model or give it more memory.",
                    sizes_tried=tried,
                    bytes_requested=outcome.bytes_requested,
                )
            self.batch_size //= 2
            tried.append(self.batch_size)
            _logger.info("out of memory in evaluation; pieces of %d now", self.batch_size)

    def _attempt(
        self, model: nn.Module, data: Data, within: AbstractContextManager[object]
    ) -> dict[str, float] | OutOfMemory:
        try:
            with evaluating(model, self._task.loss), within, working_onednn(), torch.no_grad():
                return self._means(model, data)
        except Exception as error:
            verdict = classify(error)
            if verdict is None:
                raise
            failed = error
        release(failed)
        return verdict

    def _means(self, model: nn.Module, data: Data) -> dict[str, float]:
        functions = {"loss": self._task.loss, **self._task.metrics}
        device = device_of(model, self._task.loss)
        sums = dict.fromkeys(functions, 0.0)
        total = 0.0
        for batch in evaluation_batches(data, batch_size=self.batch_size):
            inputs, targets = moved(batch, device)
            count = self._task.count
            weight = counted(count, (inputs, targets)) if count else float(batch_length(batch))
            if weight == 0:  # the mean over nothing is NaN
                continue
            outputs = call_model(model, inputs)
            values = {
                name: _number(name, function(outputs, targets))
                for name, function in functions.items()
            }
            for name, value in values.items():
                sums[name] += value * weight
            total += weight
            if not self._judged:
                self._judged = True  # also if memory runs out in there
                self._judged = judged(
                    functions,
                    values,
                    (inputs, targets),
                    outputs,
                    model=model,
                    count=count,
                    device=device,
                )
        if total == 0:
            raise TaskError(
                "count is 0 for all of the data that is evaluated, which then has no mean loss; "
                "must be positive for some of it."
            )
        return {name: value / total for name, value in sums.items()}


def _number(name: str, value: object) -> float:
    """What a loss or metric gave for a piece.

    Raises:
        TaskError: It is no single number.
    """
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        if classify(error) is not None:
            raise
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
        raise TaskError(
            f"{name} returned a {type(value).__name__}{shape}; must return one number, the mean "
            "over the samples, such as values.mean()."
        ) from None

"""Reads the gradient noise of a model as it stands, from training samples but without a step.

P: samples that are read, n: microbatches that they are cut into.
"""

from __future__ import annotations

import logging
from typing import Any

import optree
import torch

from bs_optuna.science.noise_scale import NoiseReading
from bs_optuna.science.noise_scale import NoiseScale
from bs_optuna.training.backward import AccumulatedBackward
from bs_optuna.training.batches import batch_length
from bs_optuna.training.buffer_copies import BufferCopies
from bs_optuna.training.data import Data
from bs_optuna.training.data import first_samples
from bs_optuna.training.data import length
from bs_optuna.training.data import training_batches
from bs_optuna.training.learner import Learner
from bs_optuna.training.limit import MemoryLimit
from bs_optuna.training.modes import evaluating
from bs_optuna.training.normalization import active_batch_norms
from bs_optuna.training.oom import empty_caches
from bs_optuna.training.oom import release
from bs_optuna.training.random_states import kept_random_states
from bs_optuna.training.snapshot import StepSnapshot


_logger = logging.getLogger(__name__)

MICROBATCHES = 16
# A reading is worth one part in so many of the samples that a run is trained on.
PART = 25
FEWEST, MOST = 64, 2048
MOST_BYTES = 2**26  # of samples at a time, unless a batch has more


class NoiseProbe:
    """Reads noise while a run trains, which goes on as if nothing had been read.

    Args:
        data: What it trains on.
        batch_size: Samples that it holds at a time.
        device: Where it trains.
        limit: In force during a reading.

    Attributes:
        samples: P of the last reading; 0 before one, and where a run is too short for any.
    """

    def __init__(
        self, data: Data, *, batch_size: int, device: torch.device, limit: MemoryLimit
    ) -> None:
        self.samples = 0
        self._data = data
        self._batch_size = batch_size
        self._device = device
        self._limit = limit

    def read(
        self, learner: Learner, *, run_samples: float, seed: int, microbatch_size: int
    ) -> NoiseReading | None:
        """A reading of the learner as it is now.

        Args:
            learner: At any step of its training; gradients that it holds are forgotten.
            run_samples: Samples that the whole run is trained on.
            seed: Of the order in which samples are taken.
            microbatch_size: The most that is known to fit.

        Returns:
            None if there are too few samples, or that failed, for want of memory or otherwise.
        """
        try:
            with kept_random_states(self._device):  # which a data set may draw from
                self.samples = samples_to_read(
                    self._data, batch_size=self._batch_size, run_samples=run_samples
                )
                if not self.samples:
                    return None
                batch = next(training_batches(self._data, batch_size=self.samples, seed=seed))
                with self._limit.active():
                    return read_gradient_noise(learner, batch, microbatch_size=microbatch_size)
        except Exception as error:
            failed = error
        _logger.info("the gradient noise was not read: %s: %s", type(failed).__name__, failed)
        release(failed)
        empty_caches()
        return None


def samples_to_read(data: Data, *, batch_size: int, run_samples: float) -> int:
    """P: enough to tell signal from noise, few beside the training, no more than memory has.

    Args:
        data: Where they are taken from.
        batch_size: Samples that training holds at a time.
        run_samples: Samples that the whole run is trained on.

    Returns:
        0 where that is too few to read anything.
    """
    wanted = min(MOST, int(run_samples / PART))
    leaves: list[torch.Tensor] = optree.tree_leaves(first_samples(data, 1))  # type: ignore[arg-type]
    held = MOST_BYTES // max(1, sum(leaf.numel() * leaf.element_size() for leaf in leaves))
    found = min(length(data), wanted, max(batch_size, held))
    return found if wanted >= FEWEST else 0


def read_gradient_noise(
    learner: Learner, batch: tuple[Any, Any], *, microbatch_size: int
) -> NoiseReading | None:
    """The noise of one gradient, with dropout as in training; the learner stays as it is.

    BatchNorm normalizes by its running statistics meanwhile, so that samples have gradients of
    their own.

    Args:
        learner: At any step of its training; gradients that it holds are forgotten.
        batch: Inputs and targets of P samples.
        microbatch_size: The most that is known to fit.

    Returns:
        None if P is too small to be cut, or a BatchNorm has no running statistics.
    """
    size = min(microbatch_size, -(-batch_length(batch) // MICROBATCHES))
    scale = NoiseScale(decay=0.0)
    learner.forget_gradients()
    with evaluating(*active_batch_norms(learner.modules)):
        backward = AccumulatedBackward(
            learner.model,
            learner.task.loss,
            microbatch_size=size,
            count=learner.task.count,
            noise_scale=scale,
        )
        backward.warned = True
        parts = [part for root in learner.modules for part in root.modules()]
        before = StepSnapshot(
            parts,
            learner.parameters,
            batch,
            buffers=BufferCopies(parts, all_copied=True),
            device_types={p.device.type for p in learner.parameters},
            foreign=True,
        )
        try:
            backward(*batch)
        finally:
            before.restore()
    return scale.averages

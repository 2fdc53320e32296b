"""Reads the gradient noise of a model as it stands, from training samples but without a step.

P: samples that are read, n: microbatches that they are cut into.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import optree
import torch
from torch import nn

from bs_optuna.science.noise_scale import NoiseReading
from bs_optuna.science.noise_scale import NoiseScale
from bs_optuna.training.backward import AccumulatedBackward
from bs_optuna.training.batches import batch_length
from bs_optuna.training.buffer_copies import BufferCopies
from bs_optuna.training.data import Data
from bs_optuna.training.data import first_samples
from bs_optuna.training.data import length
from bs_optuna.training.learner import Learner
from bs_optuna.training.normalization import active_batch_norms
from bs_optuna.training.snapshot import StepSnapshot


MICROBATCHES = 16
# A reading is worth one part in so many of the samples that a run is trained on.
PART = 25
FEWEST, MOST = 64, 2048
MOST_BYTES = 2**26  # of samples at a time, unless a batch has more


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
    with _fixed_norms(learner.modules):
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


@contextmanager
def _fixed_norms(modules: list[nn.Module]) -> Iterator[None]:
    """A context in which BatchNorm takes its running statistics."""
    norms = [(norm, norm.training) for norm in active_batch_norms(modules)]
    for norm, _ in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm, training in norms:
            norm.train(training)

"""Run in a process of its own: real failures in forward, backward, step and evaluation.

Prints as JSON how many there were of each, how much the process grew, and what was imported.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
from collections import Counter

import torch
from torch import nn

from bs_optuna.errors import MicrobatchDoesNotFitError
from bs_optuna.errors import StepDoesNotFitError
from bs_optuna.training import AccumulatedBackward
from bs_optuna.training import GuardedStep
from bs_optuna.training import TrainingTask
from bs_optuna.training.evaluation import Evaluation
from bs_optuna.training.limit import MemoryLimit
from bs_optuna.training.memory_limit import memory_limit
from bs_optuna.training.process_memory import process_memory


LIMITS = (1, 3, 6, 9, 12, 15, 18, 24)  # MiB
FAILURES = 200
WIDTH = 32768  # 2 MiB of weights in the last layer
BATCH = 32  # 4 MiB of activations in each layer


class Failures(logging.Handler):
    """Notes where each attempt failed, without much memory of its own."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.where: Counter[str] = Counter()
        self.phase = ""

    def emit(self, record: logging.LogRecord) -> None:
        module = record.name.rpartition(".")[2]
        self.where[self.phase if module == "backward" else module] += 1


FOUND = Failures()


def forward_begins(module: nn.Module, inputs: object) -> None:
    FOUND.phase = "forward"


def backward_begins(grad: torch.Tensor) -> None:
    FOUND.phase = "backward"


def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    loss = nn.functional.cross_entropy(outputs, targets)
    if loss.requires_grad:
        loss.register_hook(backward_begins)
    return loss


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.LayerNorm(WIDTH), nn.Tanh(), nn.Dropout(0.1), nn.GELU(), nn.Linear(WIDTH, 16)
    )
    model.register_forward_pre_hook(forward_begins)
    return model


def data() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(BATCH, WIDTH), torch.zeros(BATCH, dtype=torch.long)


def attempt(limit: MemoryLimit) -> None:
    """One training step and an evaluation, as far as the limit lets them."""
    limit.start_trial()
    model, batch = network(), data()
    task = TrainingTask(model=network, train_data=batch, valid_data=batch, loss=loss_fn)
    step = GuardedStep(torch.optim.AdamW(model.parameters(), foreach=True), max_norm=1.0)
    try:
        with limit.active():
            AccumulatedBackward(model, loss_fn)(*batch)
            step()
    except (MicrobatchDoesNotFitError, StepDoesNotFitError) as error:
        FOUND.where[type(error).__name__] += 1
    try:
        Evaluation(task, batch_size=BATCH)(model, batch, within=limit.active())
    except MicrobatchDoesNotFitError as error:
        FOUND.where[type(error).__name__] += 1


def main() -> None:
    torch.set_num_threads(1)
    logger = logging.getLogger("bs_optuna.training")
    logger.setLevel(logging.INFO)
    logger.addHandler(FOUND)
    free = memory_limit(torch.device("cpu"), None)
    limits = [memory_limit(torch.device("cpu"), mebibytes * 2**20) for mebibytes in LIMITS]
    limits[0].warm_up(lambda: attempt(free))
    before = set(sys.modules)
    gc.freeze()  # each failure collects garbage: leave out what was there before
    for limit in limits:  # one round before it is measured: nothing is set up for the first time
        attempt(limit)
    gc.collect()
    start, first = process_memory("VmData")["VmData"], FOUND.where.total()
    while FOUND.where.total() - first < FAILURES:
        for limit in limits:
            attempt(limit)
    gc.collect()
    print(
        json.dumps(
            {
                "where": FOUND.where,
                "grown": process_memory("VmData")["VmData"] - start,
                "imported": sorted(set(sys.modules) - before),
            }
        )
    )


if __name__ == "__main__":
    main()

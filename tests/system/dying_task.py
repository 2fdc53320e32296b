"""A task whose model sends its own process a signal in the middle of a training.

Environment: DYING_OF is the signal's name, DYING_AT the forward pass of a training at which it is
sent, DYING_TIMES how often in all. Every forward pass of a training leaves a line in
passes.log, but for those of the steps on two samples that only look how much memory there is.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from torch import nn

from bs_optuna.training import TrainingTask


LOG = Path("passes.log")
DEATHS = Path("deaths.log")


class Dying(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))
        self.passes = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        looks = len(inputs) == 2 or type(inputs) is not torch.Tensor
        if self.training and torch.is_grad_enabled() and not looks:
            self.passes += 1
            with LOG.open("a") as log:
                log.write(f"{os.getpid()} {len(inputs)}\n")
            if self.passes == int(os.environ["DYING_AT"]):
                deaths = len(DEATHS.read_text().split()) if DEATHS.exists() else 0
                if deaths < int(os.environ["DYING_TIMES"]):
                    with DEATHS.open("a") as log:
                        log.write(f"{os.getpid()}\n")
                    os.kill(os.getpid(), signal.Signals[os.environ["DYING_OF"]])
        return self.layers(inputs)


def task() -> TrainingTask:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(320, 4, generator=generator)
    targets = inputs.sum(1, keepdim=True)
    return TrainingTask(
        name="dying",
        model=Dying,
        train_data=(inputs[:256], targets[:256]),
        valid_data=(inputs[256:], targets[256:]),
        loss=nn.functional.mse_loss,
    )

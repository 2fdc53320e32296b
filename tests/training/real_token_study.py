"""Run in a process of its own: a study on texts of varying length under a real limit on memory.

Prints, as JSON, what each trial stored, with and without the lengths of the texts.
"""

from __future__ import annotations

import json
from typing import Any

import optuna
import torch
from torch import nn

from bs_optuna.training import Budget
from bs_optuna.training import TrainingObjective
from bs_optuna.training import TrainingTask


LIMIT = 8 * 2**20
WIDTH = 512
# Each element takes 32 channels of 4 bytes in each of the layers: a text of 512 about half a MiB.
SIZES = (64, 16, 48, 64)


class Model(nn.Module):
    """Reads texts; memory for it can only be predicted where nobody looks at a value."""

    def __init__(self, *, looks: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(50, 32), nn.Tanh(), nn.GELU(), nn.Linear(32, 50))
        self.looks = looks

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.looks and tokens.max().item() >= 50:
            raise ValueError("no such token")
        outputs: torch.Tensor = self.net(tokens)
        return outputs


def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=0)


def make_task(*, looks: bool, varying: bool) -> TrainingTask:
    """192 texts, short but for every 48th."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(8, 65, (192,), generator=generator)
    lengths[::48] = WIDTH
    texts = torch.randint(1, 50, (192, WIDTH), generator=generator)
    texts *= torch.arange(WIDTH) < lengths[:, None]
    return TrainingTask(
        model=lambda: Model(looks=looks),
        train_data=(texts, texts),
        valid_data=(texts[:32], texts[:32]),
        loss=loss_fn,
        count=lambda inputs, targets: (targets != 0).sum(),
        lengths=(lambda inputs, targets: (inputs != 0).sum(1)) if varying else None,
        trim=(lambda x, y, longest: (x[:, :longest], y[:, :longest])) if varying else None,
    )


def run_study(*, looks: bool, varying: bool) -> list[dict[str, Any]]:
    """What each trial stored, and how it ended."""
    objective = TrainingObjective(
        make_task(looks=looks, varying=varying),
        budget=Budget("samples", 384),
        batch_size=(8, 64),
        memory_limit=LIMIT,
        device=torch.device("cpu"),
    )
    study = optuna.create_study()
    for batch_size in SIZES:
        study.enqueue_trial({"batch_size": batch_size, "lr": 1e-3})
    study.optimize(objective, n_trials=len(SIZES))
    return [{"state": trial.state.name, **trial.user_attrs} for trial in study.trials]


def main() -> None:
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found = {
        "predicted": run_study(looks=False, varying=True),
        "searched": run_study(looks=True, varying=True),
        "samples": run_study(looks=False, varying=False),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""A study of three trials under a real limit: how often memory runs out, and what is wasted."""

from __future__ import annotations

import json
import sys
from typing import Any

import optuna
import torch
from torch import nn

from bs_optuna.sampling import attributes
from bs_optuna.training import Budget
from bs_optuna.training import TrainingObjective
from bs_optuna.training import TrainingTask
from bs_optuna.training import evaluation
from bs_optuna.training.known_sizes import NOTHING_KNOWN
from bs_optuna.training.loop import TrainingRun
from bs_optuna.training.memory_limit import memory_limit
from bs_optuna.training.run_settings import RunSettings


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 65536), nn.ReLU(), nn.Linear(65536, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)),
        nn.Upsample(16),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
        self.embed = nn.Linear(1, 64)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.encoder(self.embed(x.unsqueeze(-1))).mean(1))


def item_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    loss = nn.functional.cross_entropy(outputs, targets)
    return loss if loss.item() > 0 else -loss


class Upsampled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 16, 3)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> Any:
        images = self.convolution(x.view(-1, 1, 4, 4).repeat(1, 1, 4, 4))
        return self.head(
            nn.functional.interpolate(images, scale_factor=2, mode="bilinear").mean((2, 3))
        )


MODELS: dict[str, Any] = {
    "wide": wide,
    "cnn": cnn,
    "transformer": Transformer,
    "untraceable": wide,
    "upsampled": Upsampled,
    "immeasurable": wide,
}


def make_task(model: str, optimizer: str, samples: int) -> TrainingTask:
    data = torch.randn(samples, 16), torch.zeros(samples, dtype=torch.long)
    looks = model in ("untraceable", "immeasurable")
    return TrainingTask(
        model=MODELS[model],
        train_data=data,
        valid_data=data,
        optimizer=optimizer,
        loss=item_loss if looks else nn.functional.cross_entropy,
        # The next batch may hold longer ones, so no step is measured.
        lengths=(lambda inputs, targets: [1] * len(inputs)) if model == "immeasurable" else None,
    )


def fails(task: TrainingTask, size: int, limit: int, device: torch.device) -> bool:
    settings = RunSettings(
        batch_size=2 * size,
        learning_rate=1e-4,
        budget=Budget("steps", 2),
        seed=0,
        microbatch_size=size,
        evaluations=1,
    )
    run = TrainingRun(task, settings, device=device, limit=memory_limit(device, limit))
    for _ in run.evaluations():
        pass
    return size in run.failed_sizes


def run_study(model: str, optimizer: str, limit: int, samples: int, device: torch.device) -> Any:
    task = make_task(model, optimizer, samples)
    evaluations: list[int] = []
    attempt = evaluation.Evaluation._attempt

    def counted(*arguments: Any) -> Any:
        evaluations.append(1)
        return attempt(*arguments)

    evaluation.Evaluation._attempt = counted  # type: ignore[method-assign]
    objective = TrainingObjective(
        task,
        budget=Budget("steps", 2),
        batch_size=(16, samples),
        memory_limit=limit,
        device=device,
    )
    objective._starting_sizes.predict(samples, NOTHING_KNOWN, measure=True)
    evaluations.clear()  # those of the rehearsal and of what was measured
    study = optuna.create_study()

    def trial(batch_size: int) -> dict[str, Any]:
        study.enqueue_trial({"batch_size": batch_size, "lr": 1e-4})
        study.optimize(objective, n_trials=1)
        return study.get_trials()[-1].user_attrs

    trials = [trial(samples), trial(samples // 3)]
    # A multiple of the microbatch is cut into the largest ones.
    predicted = objective._starting_sizes.predicted(samples).microbatch
    trials.append(trial(min(samples, 2 * (predicted or 1))))
    fits = max(t[attributes.MICROBATCH_FITS] for t in trials)
    failed_evaluations = len(evaluations) - 2 * len(trials)
    searched = model == "immeasurable"
    return {
        "failures": sum(t[attributes.BACKOFFS] for t in trials),
        "failed evaluations": failed_evaluations,
        "batches": [t[attributes.SAMPLES] // t[attributes.STEPS] for t in trials],
        "predicted": predicted,
        "fits": fits,
        "a ninth more fails": searched or fails(task, int(fits / 0.9) + 1, limit, device),
    }


def main() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    model, optimizer, mib, samples, device = sys.argv[1:]
    found = run_study(model, optimizer, int(mib) * 2**20, int(samples), torch.device(device))
    print(json.dumps(found))


if __name__ == "__main__":
    main()

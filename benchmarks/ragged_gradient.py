"""The gradient of a batch that microbatches do not divide, as each system accumulates it."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import TensorDataset


SAMPLES, MICROBATCH = 100, 32  # 32 + 32 + 32 + 4 for a loader; 4 x 25 for bs_optuna
STEPS = 4


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def _data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    inputs = torch.randn(SAMPLES, 8, dtype=torch.float64)
    return inputs, inputs[:, :3].argmax(dim=1)


def _gradient(model: nn.Module) -> torch.Tensor:
    parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(parts).clone()


def _whole() -> torch.Tensor:
    model, (inputs, targets) = _model(), _data()
    nn.functional.cross_entropy(model(inputs), targets).backward()
    return _gradient(model)


def _bs_optuna() -> torch.Tensor:
    from bs_optuna.training import AccumulatedBackward

    model = _model()
    AccumulatedBackward(model, nn.functional.cross_entropy, microbatch_size=MICROBATCH)(*_data())
    return _gradient(model)


def _accelerate() -> torch.Tensor:
    """As in the guide to its gradient accumulation."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=STEPS)
    loader = DataLoader(TensorDataset(*_data()), batch_size=MICROBATCH)
    model, loader = accelerator.prepare(_model(), loader)
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(inputs), targets))
    return _gradient(model)


def _lightning() -> torch.Tensor:
    """Its Trainer with accumulate_grad_batches."""
    import lightning.pytorch as pl

    seen: list[torch.Tensor] = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = _model()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            seen.append(_gradient(self.net))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=1, accumulate_grad_batches=STEPS, accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(Module(), DataLoader(TensorDataset(*_data()), batch_size=MICROBATCH))
    return seen[0]


def error(system: str) -> float:
    """Distance from the gradient of the whole batch, as a part of its length, in float64."""
    systems = {"bs_optuna": _bs_optuna, "accelerate": _accelerate, "lightning": _lightning}
    whole = _whole()
    return float((systems[system.split()[0]]() - whole).norm() / whole.norm())

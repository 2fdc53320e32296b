"""One training in a small memory, as bs_optuna, accelerate and Lightning run it: what each met."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bs_optuna.training.limit import MemoryLimit
from bs_optuna.training.memory_limit import memory_limit
from bs_optuna.training.oom import classify


BATCH, STEPS, SAMPLES = 1024, 3, 8192


class Wide(nn.Sequential):
    """0.75 MB of activations a sample beside 7 MB of parameters; counts the samples it is fed."""

    fed = 0
    failed = 0

    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 65536), nn.ReLU(), nn.Linear(65536, 10))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The logits."""
        # Samples that a prediction is made with are of another type: nothing is computed.
        if self.training and torch.is_grad_enabled() and type(inputs) is torch.Tensor:
            Wide.fed += len(inputs)
        outputs: torch.Tensor = super().forward(inputs)
        return outputs


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SAMPLES, 16, generator=generator), torch.zeros(SAMPLES, dtype=torch.long)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """As bs_optuna makes it, for all."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def train(device: torch.device, *, microbatch: int, accumulation: int, steps: int = STEPS) -> None:
    """A training loop as a person writes it."""
    inputs, targets = data()
    model = Wide().to(device)
    optimizer = adamw(model)
    for _ in range(steps):
        optimizer.zero_grad()
        for part in range(accumulation):
            here = slice(part * microbatch, (part + 1) * microbatch)
            outputs = model(inputs[here].to(device))
            loss = nn.functional.cross_entropy(outputs, targets[here].to(device))
            (loss / accumulation).backward()
        optimizer.step()


def limited(device: torch.device, limit_bytes: int | None) -> MemoryLimit:
    """The limit, ready to be imposed."""
    limit = memory_limit(device, limit_bytes)
    limit.warm_up(lambda: train(device, microbatch=8, accumulation=2, steps=1))
    limit.start_trial()
    Wide.fed = 0
    return limit


def run_bs_optuna(device: torch.device, limit_bytes: int | None) -> dict[str, Any]:
    """One trial of a study."""
    import optuna

    from bs_optuna.sampling import attributes
    from bs_optuna.training import Budget
    from bs_optuna.training import TrainingObjective
    from bs_optuna.training import TrainingTask

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    inputs, targets = data()
    task = TrainingTask(
        model=Wide,
        train_data=(inputs, targets),
        valid_data=(inputs[:256], targets[:256]),
        loss=nn.functional.cross_entropy,
    )
    objective = TrainingObjective(
        task,
        budget=Budget("steps", STEPS),
        batch_size=(16, BATCH),
        memory_limit=limit_bytes,
        device=device,
    )
    study = optuna.create_study()
    study.enqueue_trial({"batch_size": BATCH, "lr": 1e-4})
    Wide.fed = 0  # after the rehearsal, which every row has
    study.optimize(objective, n_trials=1)
    stored = study.trials[0].user_attrs
    return {
        "size": stored[attributes.MICROBATCH_SIZE],
        "failed": stored[attributes.BACKOFFS],
        "batch": stored[attributes.EFFECTIVE_BATCH_SIZE],
        "works": stored[attributes.STEPS] == STEPS,
    }


def run_accelerate(device: torch.device, limit_bytes: int | None) -> dict[str, Any]:
    """Its decorator around a whole training, accumulating as in its own example."""
    from accelerate.utils import find_executable_batch_size

    tried: list[int] = []

    @find_executable_batch_size(starting_batch_size=BATCH)
    def training(batch_size: int) -> int:
        tried.append(batch_size)
        accumulation = max(1, BATCH // batch_size)
        train(device, microbatch=batch_size, accumulation=accumulation)
        return accumulation * batch_size

    with limited(device, limit_bytes).active():
        batch = training()
    return {"size": tried[-1], "failed": len(tried) - 1, "batch": batch, "works": True}


def run_lightning(device: torch.device, limit_bytes: int | None, mode: str) -> dict[str, Any]:
    """Its callback before a fit with the size it found; it does not accumulate."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import BatchSizeFinder
    from lightning.pytorch.tuner import batch_size_scaling

    class Module(pl.LightningModule):
        batch_size = 2

        def __init__(self) -> None:
            super().__init__()
            self.net = Wide()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            inputs, targets = batch
            return nn.functional.cross_entropy(self.net(inputs), targets)

        def train_dataloader(self) -> Any:
            dataset = torch.utils.data.TensorDataset(*data())
            return torch.utils.data.DataLoader(dataset, batch_size=self.batch_size)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adamw(self)

    recognize = batch_size_scaling.is_oom_error

    def counted(error: BaseException) -> bool:
        Wide.failed += 1
        return bool(recognize(error))

    batch_size_scaling.is_oom_error = counted
    module = Module()
    trainer = pl.Trainer(
        max_steps=STEPS, callbacks=[BatchSizeFinder(mode=mode)], accelerator=device.type, devices=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    works = True
    with limited(device, limit_bytes).active():
        try:
            trainer.fit(module)
        except RuntimeError as error:
            if classify(error) is None:
                raise
            works = False
    size = module.batch_size
    return {"size": size, "failed": Wide.failed + (not works), "batch": size, "works": works}


def run_truth(device: torch.device, limit_bytes: int | None) -> dict[str, Any]:
    """The largest microbatch that a plain accumulating loop can take, by trying."""

    def fits(size: int) -> bool:
        limit.start_trial()
        try:
            with limit.active():
                train(device, microbatch=size, accumulation=2)
        except RuntimeError as error:
            if classify(error) is None:
                raise
            return False
        return True

    limit = limited(device, limit_bytes)
    low, high = 0, BATCH
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return {"size": low}

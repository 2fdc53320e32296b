"""What bs_optuna costs beside training: one step, a whole study, and the answer to --help.

    python benchmarks/overhead.py

Each figure is a ratio against the same work without bs_optuna, measured in turns in this process.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import optuna
import torch
from torch import nn

from bs_optuna import NoiseScale
from bs_optuna.config import StudyConfig
from bs_optuna.sampling import attributes
from bs_optuna.science.companions import warmup_steps
from bs_optuna.study.tuning import prepare
from bs_optuna.tasks import digits
from bs_optuna.training import AccumulatedBackward
from bs_optuna.training import GuardedStep
from bs_optuna.training.data import evaluation_batches
from bs_optuna.training.data import training_batches
from bs_optuna.training.loop import STEPS_BETWEEN_CHECKS
from bs_optuna.training.recipes import optimizer_factory
from bs_optuna.training.schedule import learning_rate_factor


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call; waits for an accelerator."""
    begin = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - begin


def compare(ours: Callable[[], object], theirs: Callable[[], object], *, turns: int) -> list[float]:
    """Times both in turns; returns the median of each and the ratio of those.

    Every other turn the other way round: which of two steps pays for the memory that the C library
    gave back meanwhile depends on their order.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns):
        for which in (0, 1) if turn % 2 else (1, 0):
            times[which].append(seconds((ours, theirs)[which]))
    a, b = (statistics.median(t[turns // 5 :]) for t in times)
    return [a, b, a / b]


def step(
    device: torch.device,
    turns: int,
    optimizer: type[torch.optim.Optimizer] | None = None,
) -> list[float]:
    """A step at full microbatch against the plain one: the gradient, and with an optimizer all."""
    torch.manual_seed(0)
    width, batch = (256, 256) if device.type == "cpu" else (1024, 2048)
    x = torch.randn(batch, 1, 8, 8, device=device)
    y = torch.randint(10, (batch,), device=device)
    models = [
        nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Dropout(0.1),
            nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(),
            nn.Linear(32 * 64, width), nn.ReLU(), nn.Linear(width, 10),
        ).to(device)
        for _ in range(2)
    ]  # fmt: skip
    loss_fn = nn.functional.cross_entropy
    backward = AccumulatedBackward(models[0], loss_fn)
    made = [] if optimizer is None else [optimizer(m.parameters(), lr=1e-4) for m in models]
    steps = [GuardedStep(made[0]), made[1].step] if made else []

    def ours() -> None:
        models[0].zero_grad()
        backward(x, y)
        for guarded in steps[:1]:
            guarded()

    def plain() -> None:
        models[1].zero_grad()
        loss_fn(models[1](x), y).backward()
        for bare in steps[1:]:
            bare()

    return compare(ours, plain, turns=turns)


def noise(device: torch.device, turns: int) -> list[float]:
    """A batch in four microbatches whose gradient noise is read, against one whose is not."""
    torch.manual_seed(0)
    width, batch = (256, 256) if device.type == "cpu" else (1024, 2048)
    x = torch.randn(batch, 512, device=device)
    y = torch.randint(10, (batch,), device=device)
    model = nn.Sequential(
        nn.Linear(512, 4 * width), nn.ReLU(), nn.Linear(4 * width, 4 * width), nn.ReLU(),
        nn.Linear(4 * width, 10),
    ).to(device)  # fmt: skip
    backwards = [
        AccumulatedBackward(
            model, nn.functional.cross_entropy, microbatch_size=batch // 4, noise_scale=scale
        )
        for scale in (NoiseScale(), None)
    ]

    def run(backward: AccumulatedBackward) -> None:
        model.zero_grad()
        backward(x, y)

    return compare(lambda: run(backwards[0]), lambda: run(backwards[1]), turns=turns)


def bare_training(setting: dict[str, Any]) -> None:
    """The training of one trial, as a person would write it, up to where the trial was stopped."""
    task = setting["task"]
    torch.manual_seed(setting["seed"])
    model = task.model().to(setting["device"])
    optimizer = optimizer_factory(task.optimizer)(model.parameters(), setting["lr"])
    for group in optimizer.param_groups:
        group["fused"] = True  # PyTorch's fastest way
    batches = training_batches(
        task.train_data, batch_size=setting["batch_size"], seed=setting["seed"]
    )
    _, beta2 = optimizer.defaults.get("betas", (None, None))
    warmup = warmup_steps(setting["total"], beta2=beta2) / setting["total"]
    for done in range(setting["steps"]):
        factor = learning_rate_factor((done + 0.5) / setting["total"], warmup=warmup)
        for group in optimizer.param_groups:
            group["lr"] = setting["lr"] * factor
        inputs, targets = (t.to(setting["device"]) for t in next(batches))
        optimizer.zero_grad()
        loss = task.loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        if setting["device"].type == "cpu" or done % STEPS_BETWEEN_CHECKS == 0:
            loss.item()  # as often as bs_optuna: it waits for an accelerator
        if (done + 1) * 5 // setting["total"] > done * 5 // setting["total"]:
            bare_evaluation(model, setting)


def bare_evaluation(model: nn.Module, setting: dict[str, Any]) -> None:
    """Loss and metrics on the validation data."""
    task = setting["task"]
    model.eval()
    with torch.no_grad():
        for batch in evaluation_batches(task.valid_data, batch_size=256):
            inputs, targets = (t.to(setting["device"]) for t in batch)
            outputs = model(inputs)
            task.loss(outputs, targets).item()
            for metric in task.metrics.values():
                metric(outputs, targets).item()
    model.train()


def study(trials: int, device: torch.device) -> list[float]:
    """A study on SQLite, sampler and pruner included, against its trainings in a bare loop.

    The bare training of a trial follows right after it, so that a busy machine slows both.
    """
    task = digits.task()
    bare = 0.0

    def ended(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        nonlocal bare
        setting = {
            "task": task,
            "device": device,
            "seed": trial.number,
            "batch_size": trial.params["batch_size"],
            "lr": trial.params["lr"],
            "steps": trial.user_attrs[attributes.STEPS],
            "total": tuning.objective.budget.steps(trial.params["batch_size"]),
        }
        bare += seconds(lambda: bare_training(setting))

    with tempfile.TemporaryDirectory() as folder:
        storage = f"sqlite:///{folder}/study.db"
        tuning = prepare(StudyConfig(trials=trials, storage=storage, device=str(device)), task)
        for size in tuning.objective.search_space["batch_size"].high, 64:  # warms both up
            tuning.objective.confirm(size, 1e-3, seed=0, study=tuning.study)
        both = seconds(lambda: tuning.run(timeout=None, started=lambda trial: None, ended=ended))
    return [both - bare, bare, (both - bare) / bare]


def answer_to_help() -> list[float]:
    """``--help`` against the import of PyTorch and Optuna, each in a new process."""

    def run(*arguments: str) -> Callable[[], object]:
        return lambda: subprocess.run(
            [sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL
        )

    return compare(
        run("-m", "bs_optuna.tune", "--help"), run("-c", "import torch, optuna"), turns=10
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trials", type=int, default=30)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_flush_denormal(True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':36s}{'bs_optuna':>11s}{'without':>11s}{'ratio':>8s}")

    def studies() -> list[float]:
        """The median of three: each is off by a few percent on a machine with other work."""
        measured = [study(arguments.trials, device) for _ in range(3)]
        print("ratios of three studies:", *(f"{ratio:.3f}" for *_, ratio in measured))
        return sorted(measured, key=lambda s: s[2])[1]

    rows = (
        ("forward and backward (seconds)", lambda: step(device, turns=100)),
        ("whole step, AdamW", lambda: step(device, 100, torch.optim.AdamW)),
        ("whole step, SGD", lambda: step(device, 100, torch.optim.SGD)),
        ("whole step, RAdam, which is copied", lambda: step(device, 100, torch.optim.RAdam)),
        ("reading the gradient noise", lambda: noise(device, 100)),
        (f"study of {arguments.trials} trials (seconds)", studies),
        ("--help / import torch, optuna (s)", answer_to_help),
    )
    for label, measure in rows:
        ours, theirs, ratio = measure()
        print(f"{label:36s}{ours:11.4f}{theirs:11.4f}{ratio:8.3f}", flush=True)


if __name__ == "__main__":
    main()

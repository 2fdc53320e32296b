"""The built-in tasks: real data, split once and for all, and models that learn it."""

from __future__ import annotations

import math
from collections import Counter

import optuna
import pytest
import torch

from bs_optuna.tasks import digits
from bs_optuna.tasks import text
from bs_optuna.training import Budget
from bs_optuna.training import TrainingObjective
from bs_optuna.training import TrainingTask


def rows(data: object) -> Counter[bytes]:
    assert isinstance(data, tuple)
    return Counter(row.numpy().tobytes() for row in data[0])


def test_digits_are_split_without_loss_and_always_alike() -> None:
    first, second = digits.task(), digits.task()
    for part in ("train_data", "valid_data", "test_data"):
        assert torch.equal(getattr(first, part)[0], getattr(second, part)[0])
    parts = [rows(getattr(first, p)) for p in ("train_data", "valid_data", "test_data")]
    assert [sum(part.values()) for part in parts] == [1257, 270, 270]
    whole = rows((torch.tensor(digits.load_digits().images, dtype=torch.float32) / 16, None))
    assert parts[0] + parts[1] + parts[2] == whole


def test_text_predicts_the_next_character() -> None:
    task = text.task()
    assert isinstance(task.train_data, tuple)
    inputs, targets = task.train_data
    assert inputs.shape == targets.shape == (len(inputs), 64)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_the_transformer_does_not_look_ahead() -> None:
    torch.manual_seed(0)
    model = text.CharacterTransformer(50).eval()
    codes = torch.randint(50, (2, 64))
    changed = codes.clone()
    changed[:, 40:] = torch.randint(50, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(model(codes)[:, :40], model(changed)[:, :40])


def score(task: TrainingTask, budget: str, batch_size: int, rate: float) -> dict[str, float]:
    objective = TrainingObjective(
        task, budget=Budget.parse(budget), batch_size=(8, 64), device=torch.device("cpu")
    )
    study = optuna.create_study()
    return objective.confirm(batch_size, rate, seed=0, study=study).test


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [16, 64])
def test_digits_are_learned(batch_size: int) -> None:
    assert score(digits.task(), "samples=10056", batch_size, 3e-3)["accuracy"] > 0.96


@pytest.mark.slow
def test_text_is_learned_beyond_single_characters() -> None:
    unigram = 3.24  # nats per character, of guessing by frequency alone
    found = score(text.task(), "steps=60", 32, 1e-2)["loss"]
    assert found < unigram - 0.3
    assert math.isfinite(found)

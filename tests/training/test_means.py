"""A loss or metric that is no mean over the samples is told once, and nothing else is."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from bs_optuna.training import TrainingTask
from bs_optuna.training import means
from bs_optuna.training.evaluation import Evaluation


CLASSES = 3
WEIGHT = torch.tensor([0.2, 1.8, 5.0])
PADDING = 0
_generator = torch.Generator().manual_seed(0)
LOGITS = torch.randn(64, CLASSES, generator=_generator)
LABELS = torch.randint(CLASSES, (64,), generator=_generator)
TOKEN_LOGITS = torch.randn(64, 10, CLASSES, generator=_generator)
TOKENS = torch.randint(1, CLASSES, (64, 10), generator=_generator)
TOKENS[torch.arange(10) > torch.randint(10, (64, 1), generator=_generator)] = PADDING

cross_entropy = nn.functional.cross_entropy


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(means, "_told", set())


def told(
    loss: Callable[..., Any] = cross_entropy,
    metric: Callable[..., Any] | None = None,
    *,
    data: tuple[Any, Any] = (LOGITS, LABELS),
    model: nn.Module | None = None,
    pieces: int = 64,
    **task: Any,
) -> list[str]:
    """The warnings of two evaluations of a model, by default one that returns its inputs."""
    metrics = {} if metric is None else {"score": metric}
    made = TrainingTask(
        model=nn.Identity, train_data=data, valid_data=data, loss=loss, metrics=metrics, **task
    )
    evaluation = Evaluation(made, batch_size=pieces)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            evaluation(model or nn.Identity(), data, within=contextlib.nullcontext())
    return [str(warning.message) for warning in caught]


def r2(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return 1 - ((outputs - targets) ** 2).sum() / ((targets - targets.mean()) ** 2).sum()


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs.argmax(-1) == targets).float().mean()


def auc(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    return float(roc_auc_score(targets == 0, outputs[:, 0]))


def token_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=PADDING)


@pytest.mark.parametrize(
    "metric",
    [
        lambda o, t: r2(o[:, 0], t.float()),
        lambda o, t: cross_entropy(o, t).exp(),  # perplexity
        lambda o, t: cross_entropy(o, t, reduction="sum"),
        auc,
    ],
)
def test_a_metric_that_is_no_mean_is_told_once(metric: Callable[..., Any]) -> None:
    (text,) = told(metric=metric)
    assert text.startswith("The metric 'score' is no mean over the samples")
    assert "choose as objective something that is a mean" in text
    assert told(metric=metric) == []  # in another trial of the same process


def test_class_weights_need_a_count() -> None:
    loss = nn.CrossEntropyLoss(weight=WEIGHT)
    (text,) = told(loss)
    assert text.startswith("The loss is no mean over the samples")
    assert "count=lambda inputs, targets: weight[targets].sum()" in text
    assert told(loss, count=lambda inputs, targets: WEIGHT[targets].sum()) == []


def test_class_weights_show_only_in_a_piece_of_several_classes() -> None:
    ordered = LABELS.sort().values
    assert told(nn.CrossEntropyLoss(weight=WEIGHT), data=(LOGITS, ordered), pieces=8)


def entropy_of_the_mean(outputs: torch.Tensor) -> torch.Tensor:
    chances = outputs.softmax(1).mean(0)
    return (chances * chances.log()).sum()


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.01, 0.99])),
        lambda o, t: cross_entropy(o, t) + 0.05 * entropy_of_the_mean(o),
        lambda o, t: ((o[:, :1] - t.float()) ** 2).mean(),  # (n, 1) against (n,)
    ],
)
def test_what_averages_out_in_the_halves_shows_in_single_samples(loss: Callable[..., Any]) -> None:
    # Halves that are alike: twice the same samples.
    data = (LOGITS.repeat(2, 1), LABELS.repeat(2))
    (text,) = told(loss, data=data, pieces=128)
    assert text.startswith("The loss is no mean over the samples")


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(label_smoothing=0.1),
        lambda o, t: nn.functional.mse_loss(o[:, 0], t.float()),
        lambda o, t: cross_entropy(o, t) + 3 * o.square().mean(),
    ],
)
def test_means_over_samples_are_none_of_these(loss: Callable[..., Any]) -> None:
    assert told(loss, data=(1000 * LOGITS, LABELS)) == []


def test_a_mean_over_something_else_than_count_is_told() -> None:
    (text,) = told(token_loss, accuracy, data=(TOKEN_LOGITS, TOKENS), count=counted)
    assert text.startswith("The metric 'score' is no mean over what count counts")
    assert "sums divided by count(inputs, targets)" in text


def counted(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (targets != PADDING).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_means_are_not_told(dtype: torch.dtype) -> None:
    assert told(metric=accuracy, data=(LOGITS.to(dtype), LABELS)) == []
    single = LOGITS.to(dtype).flatten(), LABELS.repeat_interleave(CLASSES).to(dtype)
    assert told(nn.functional.l1_loss, nn.functional.mse_loss, data=single, pieces=192) == []


def test_tokens_with_padding_are_a_mean_over_their_count() -> None:
    data = (TOKEN_LOGITS, TOKENS)
    assert told(token_loss, data=data, count=counted) == []
    only_second = (TOKEN_LOGITS, torch.where(torch.arange(64)[:, None] < 32, PADDING, TOKENS))
    assert told(token_loss, data=only_second, count=counted) == []  # a half without a token
    (text,) = told(token_loss, data=data)
    assert text.startswith("The loss is no mean over the samples")


class TokensFirst(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.T


class WithNumber(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        return x, 1.0


class Output(OrderedDict[str, torch.Tensor]):
    """A record as the models of transformers return it, which is one leaf to others."""


class WithRecord(nn.Module):
    def forward(self, x: torch.Tensor) -> Output:
        return Output(logits=x)


@pytest.mark.parametrize(
    ("model", "logits"),
    [
        (TokensFirst(), lambda o: o.T),
        (WithNumber(), lambda o: o[0]),
        (WithRecord(), lambda o: o["logits"]),
    ],
)
def test_where_outputs_cannot_be_cut_the_model_gives_those_of_the_halves(
    model: nn.Module, logits: Callable[[Any], torch.Tensor]
) -> None:
    (text,) = told(lambda o, t: cross_entropy(logits(o), t, reduction="sum"), model=model)
    assert text.startswith("The loss is no mean over the samples")
    assert told(lambda o, t: cross_entropy(logits(o), t), model=model) == []


def test_a_model_that_draws_differs_from_itself() -> None:
    class Draws(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
            return x * torch.rand(()), 1.0

    assert told(lambda o, t: cross_entropy(o[0], t), model=Draws()) == []


def test_targets_that_are_left_out_need_a_count_though_the_values_do_not_show_it() -> None:
    ignored = torch.where(TOKENS == PADDING, -100, TOKENS)
    alike = torch.zeros_like(TOKEN_LOGITS)  # every token costs the same

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cross_entropy(outputs.flatten(0, 1), targets.flatten())

    (text,) = told(loss, data=(alike, ignored))
    assert "count=lambda inputs, targets: (targets != -100).sum()" in text
    assert told(loss, data=(alike, ignored), count=lambda x, t: (t != -100).sum()) == []
    squared = lambda o, t: (o.argmax(-1) - t).square().float().mean()  # noqa: E731
    assert told(squared, data=(alike, ignored)) == []
    as_often = TOKENS.clone()
    as_often[:, 0] = -100
    assert told(loss, data=(alike, as_often)) == []


def test_a_function_that_refuses_a_half_is_not_judged() -> None:
    def whole(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if len(targets) < 64:
            raise RuntimeError("needs all of them")
        return cross_entropy(outputs, targets)

    assert told(metric=whole) == []


class Remembering(nn.Module):
    """Divides by what it has seen so far, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.seen = self.seen + len(targets) * torch.rand(()) * random.random()  # type: ignore[has-type]
        return cross_entropy(outputs, targets) / self.seen


def test_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[float, ...]:
        random.seed(0)
        torch.manual_seed(0)
        loss = Remembering()
        assert told(loss) == []  # it is not the same of the same
        return float(loss.seen), random.random(), float(torch.rand(()))

    checked = run()
    monkeypatch.setattr(means, "FEWEST_SAMPLES", 10**9)
    assert run() == checked


def test_out_of_memory_meanwhile_makes_the_pieces_smaller() -> None:
    calls = []

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(len(targets))
        if calls == [64, 32]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return cross_entropy(outputs, targets)

    task = TrainingTask(
        model=nn.Identity, train_data=(LOGITS, LABELS), valid_data=(LOGITS, LABELS), loss=loss
    )
    evaluation = Evaluation(task, batch_size=64)
    values = evaluation(nn.Identity(), (LOGITS, LABELS), within=contextlib.nullcontext())
    assert values["loss"] == pytest.approx(float(cross_entropy(LOGITS, LABELS)))
    assert calls == [64, 32, 32, 32]
    assert (evaluation.batch_size, evaluation.lost.attempts) == (32, 1)

"""TrainingTask: what a user brings to be tuned."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from functools import cached_property
from typing import Any
from typing import Literal
from weakref import WeakSet
from weakref import WeakValueDictionary

import torch
from torch import nn

from bs_optuna.errors import TaskError
from bs_optuna.training.arguments import check_loss
from bs_optuna.training.cutting import Count
from bs_optuna.training.cutting import Lengths
from bs_optuna.training.cutting import Trim
from bs_optuna.training.cutting import sample_lengths
from bs_optuna.training.data import Data
from bs_optuna.training.data import as_data
from bs_optuna.training.data import evaluation_batches
from bs_optuna.training.data import length
from bs_optuna.training.modes import begin_training
from bs_optuna.training.normalization import active_batch_norms
from bs_optuna.training.recipes import OptimizerFactory
from bs_optuna.training.recipes import optimizer_factory
from bs_optuna.training.weighted_pass import LossFunction


UNNAMED = "task"
# All that `new_model` has returned, and every BatchNorm in them that trains, as long as they live.
_MADE: WeakSet[nn.Module] = WeakSet()
# Every trainable parameter of these, by its id: a tensor cannot be looked for in a set.
_TRAINED: WeakValueDictionary[int, nn.Parameter] = WeakValueDictionary()
_READ_AT_ONCE = 256  # samples, while the longest is sought


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """A model, its data, and how to judge it.

    The model is called as ``model(*inputs)`` where the inputs are a tuple, ``model(**inputs)``
    where they are a dict, else as ``model(inputs)``.

    Loss and metrics are evaluated in pieces, whose size depends on batch size and memory, and the
    loss is trained in microbatches: each must be a mean, of which that of the whole is the mean of
    its parts. R2, AUC, F1, perplexity and sums are none, which a warning says: tune by a mean such
    as the squared error. A loss with class weights is a mean over ``count``, which must be given:
    ``count=lambda inputs, targets: weight[targets].sum()``.

    Attributes:
        model: Makes a new model; called once a trial, with PyTorch's random state seeded.
        train_data: A pair ``(inputs, targets)`` of pytrees of tensors, or a map-style ``Dataset``
            that yields such pairs.
        valid_data: Likewise; trials are compared on it.
        test_data: Likewise; used once, for the recommended setting. Optional.
        loss: ``loss(outputs, targets)``, the mean over the samples (or over ``count``).
        metrics: Further means to report, by name, each ``metric(outputs, targets)``, over the same.
        optimizer: ``"adamw"``, ``"sgd"``, or a function of parameters and learning rate.
        objective: What trials are compared by: ``"loss"`` or the name of a metric.
        direction: ``"minimize"`` or ``"maximize"``.
        count: What the means are taken over, as ``count(inputs, targets)``, if not the samples.
        lengths: For samples that vary in length: the length of each, as ``lengths(inputs,
            targets)``. A microbatch of n samples then is any number of them that holds no more
            elements than n of the longest in ``train_data``, which is read once for that; samples
            of like length go together. See `AccumulatedBackward`.
        trim: With ``lengths``: cuts the padding of a microbatch off, as ``trim(inputs, targets,
            longest)``, which returns both; without it, model and loss must.
        batch_norm: ``"exact"`` keeps the running statistics of BatchNorm and InstanceNorm those of
            the whole batch when memory splits it; see `AccumulatedBackward`.
        name: Names the study and its file; the command line takes the name of the task's file
            or module where it is left out.

    Raises:
        TaskError: A model instead of a function that makes one, data of another kind, a loss that
            says itself that it is no mean, an unknown optimizer, an objective that is no metric,
            another ``batch_norm``, or ``trim`` without ``lengths``.
    """

    model: Callable[[], nn.Module]
    train_data: Data
    valid_data: Data
    loss: LossFunction
    test_data: Data | None = None
    metrics: Mapping[str, Callable[[Any, Any], torch.Tensor]] = field(default_factory=dict)
    optimizer: str | OptimizerFactory = "adamw"
    objective: str = "loss"
    direction: Literal["minimize", "maximize"] = "minimize"
    count: Count | None = None
    lengths: Lengths | None = None
    trim: Trim | None = None
    batch_norm: Literal["microbatch", "exact"] = "microbatch"
    name: str = UNNAMED

    def __post_init__(self) -> None:
        for name in ("train_data", "valid_data", "test_data"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, as_data(getattr(self, name), name=name))
        optimizer_factory(self.optimizer)
        if "loss" in self.metrics:
            raise TaskError(
                "metrics holds 'loss', which stands for the loss itself; give it another name."
            )
        if isinstance(self.model, nn.Module) or not callable(self.model):
            raise TaskError(
                f"model is a {type(self.model).__name__}; must be a function that makes a new one "
                "for each trial: model=lambda: Net()."
            )
        try:
            check_loss(self.loss, "mean")
        except ValueError as error:
            raise TaskError(str(error)) from None
        if self.objective not in (known := ("loss", *self.metrics)):
            raise TaskError(f"objective={self.objective!r}; must be one of {', '.join(known)}.")
        if self.direction not in ("minimize", "maximize"):
            raise TaskError(f"direction={self.direction!r}; must be 'minimize' or 'maximize'.")
        if self.trim is not None and self.lengths is None:
            raise TaskError("trim is for samples that vary in length; give lengths too.")
        if self.batch_norm not in ("microbatch", "exact"):
            raise TaskError(f"batch_norm={self.batch_norm!r}; must be 'microbatch' or 'exact'.")

    def new_model(self) -> nn.Module:
        """A model of its own for each training, in training mode as `begin_training` has it.

        Raises:
            TaskError: ``model`` returned no module, or one that it had returned before, or that
                shares what it trains with one.
        """
        model = self.model()
        if not isinstance(model, nn.Module):
            raise TaskError(f"model returned a {type(model).__name__}; must be a torch.nn.Module.")
        if model in _MADE:
            raise TaskError(
                f"model returned the same {type(model).__name__} as before, which would go on from "
                "its trained weights; make a new one in each call: model=lambda: Net()."
            )
        _MADE.add(model)
        begin_training(model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                if _TRAINED.get(id(parameter)) is parameter:
                    raise _shared(f"the parameter {name!r}", "or freeze it")
                _TRAINED[id(parameter)] = parameter
        norms = [norm for norm in active_batch_norms([model]) if any(True for _ in norm.buffers())]
        for norm in norms:
            if norm is not model and norm in _MADE:
                raise _shared(f"a {type(norm).__name__}", "or put it into evaluation mode, frozen")
            _MADE.add(norm)
        return model

    @property
    def train_samples(self) -> int:
        """Number of training samples."""
        return length(self.train_data)

    @cached_property
    def longest(self) -> int | None:
        """Elements of the longest training sample; None without ``lengths``.

        Raises:
            TaskError: ``lengths`` gives no number for each sample, or only zeros.
        """
        if self.lengths is None:
            return None
        pieces = evaluation_batches(self.train_data, batch_size=_READ_AT_ONCE)
        try:
            longest = max(max(sample_lengths(self.lengths, piece)) for piece in pieces)
        except ValueError as error:
            raise TaskError(str(error)) from None
        if longest < 1:
            raise TaskError(f"lengths gave at most {longest}; must be positive for some sample.")
        return longest


def _shared(what: str, otherwise: str) -> TaskError:
    return TaskError(
        f"model returned {what} that an earlier model had, which would go on from its training; "
        f"make it anew in each call, as with copy.deepcopy, {otherwise}."
    )

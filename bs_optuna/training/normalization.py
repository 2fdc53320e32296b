"""Norms in microbatches: running statistics of the whole batch, or GroupNorm for BatchNorm.

n: values of a channel in a batch, samples times positions; m: their mean; s: the sum of their
squared differences from m.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import ExitStack
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bs_optuna.training.snapshot import refuse_lazy


_BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_InstanceNorm = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d
# Wu and He, Group Normalization (2018), section 4.1.
GROUPS = 32


def convert_batch_norm(model: nn.Module) -> nn.Module:
    """Puts GroupNorm in the place of every BatchNorm, so that microbatches change nothing.

    GroupNorm normalizes each sample by itself, whatever else is in its batch. Do it before
    training: the running statistics are dropped, and what was trained with the one is wrong for the
    other. There are 32 groups, or the most below that which divide the channels and leave at least
    two in each. `BatchNorm1d` may stand where a channel has a single value, and few of them tell
    nothing; there all channels are one group, as in a layer normalization. Where a single channel
    has a single value nothing is left of it, and of maps of one position, as after global pooling,
    little: leave the norm out there.

    Args:
        model: Changed in place. Weight and bias stay the same objects, so that an optimizer made
            before goes on with them.

    Returns:
        The model, or what replaces it if it is itself a BatchNorm.

    Raises:
        ValueError: A lazy layer has not seen its first batch, so that its channels are not known,
            or a class inherits from BatchNorm and does something else.
    """
    refuse_lazy([model])
    _refuse_others(model)
    converted: dict[int, nn.GroupNorm] = {}
    # With duplicates: a layer that is used twice must be replaced in both places.
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, (*_BATCH_NORMS, nn.SyncBatchNorm)):
            norm = converted.setdefault(id(module), _group_norm(module))
            if not name:
                return norm
            model.set_submodule(name, norm)
    return model


def warn_of_split(
    modules: Sequence[nn.Module], microbatch_size: int, batch_size: int | None, *, stacklevel: int
) -> None:
    """Warns if a norm in training mode would take each microbatch for a batch of its own.

    Args:
        modules: What is trained.
        microbatch_size: Samples in a microbatch.
        batch_size: Samples in the batch; None where other ranks hold some of it.
        stacklevel: As in ``warnings.warn``, seen from the caller.
    """
    parts = [part for root in modules for part in root.modules()]
    if active_batch_norms(modules):
        whole = "the whole batch" if batch_size is None else f"the batch of {batch_size}"
        warnings.warn(
            f"BatchNorm normalizes each microbatch of {microbatch_size} samples by its "
            f"own statistics instead of those of {whole}. Replace it "
            "before training with bs_optuna.training.convert_batch_norm(model), or pass "
            "batch_norm='exact' to keep at least its running statistics those of the batch.",
            stacklevel=stacklevel + 1,
        )
    elif any(isinstance(p, _InstanceNorm) and p.training and p.track_running_stats for p in parts):
        warnings.warn(
            f"InstanceNorm updates its running statistics once for each microbatch of "
            f"{microbatch_size} samples; pass batch_norm='exact' for once a batch.",
            stacklevel=stacklevel + 1,
        )


def active_batch_norms(modules: Sequence[nn.Module]) -> list[_BatchNorm]:
    """Every BatchNorm that normalizes by the batch: each sample's gradient depends on the others.

    In evaluation mode one does so that keeps no running statistics.
    """
    parts = [part for root in modules for part in root.modules()]
    norms = [p for p in parts if isinstance(p, (*_BATCH_NORMS, nn.SyncBatchNorm))]
    return [norm for norm in norms if norm.training or norm.running_mean is None]


def needs_two_samples(error: BaseException) -> bool:
    """Whether BatchNorm refuses a microbatch of one sample, which the whole batch was not."""
    return isinstance(error, ValueError) and "Expected more than 1 value per channel" in str(error)


class WholeBatchStatistics:
    """Running statistics of BatchNorm and InstanceNorm as one update by the whole batch would be.

    Args:
        modules: Those whose layers that track, in training mode, are looked after.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        layers = {
            id(layer): layer
            for root in modules
            for layer in root.modules()
            if isinstance(layer, (*_BATCH_NORMS, nn.SyncBatchNorm, _InstanceNorm))
            and layer.training
            and layer.running_mean is not None
        }
        self._layers = [_Pooled(layer) for layer in layers.values()]

    @contextmanager
    def microbatch(self) -> Iterator[None]:
        """A context for the forward pass of one microbatch."""
        with ExitStack() as stack:
            for layer in self._layers:
                stack.enter_context(layer.recording())
            yield

    def write(self) -> None:
        """Updates the running statistics, once all microbatches have passed."""
        with torch.no_grad():
            for layer in self._layers:
                layer.write()


@dataclass(frozen=True)
class _Moments:
    n: int
    mean: torch.Tensor
    squares: torch.Tensor

    def merged(self, other: _Moments) -> _Moments:
        """Chan, Golub and LeVeque (1979): n = n1 + n2, s = s1 + s2 + (m2 - m1)^2 n1 n2 / n."""
        n = self.n + other.n
        difference = other.mean - self.mean
        squares = self.squares + other.squares + difference**2 * (self.n * other.n / n)
        return _Moments(n, self.mean + difference * (other.n / n), squares)

    @property
    def variance(self) -> torch.Tensor:
        return self.squares / (self.n - 1)


@dataclass(frozen=True)
class _Averages:
    """Of what InstanceNorm computes for each of n samples."""

    n: int
    mean: torch.Tensor
    variance: torch.Tensor

    def merged(self, other: _Averages) -> _Averages:
        n = self.n + other.n
        mean = torch.lerp(self.mean, other.mean, other.n / n)
        return _Averages(n, mean, torch.lerp(self.variance, other.variance, other.n / n))


class _Pooled:
    """The moments of one layer over the microbatches, for each time that it is called in one."""

    def __init__(self, layer: _BatchNorm | _InstanceNorm) -> None:
        mean, variance, updates = layer.running_mean, layer.running_var, layer.num_batches_tracked
        assert mean is not None  # a layer that tracks has both
        assert variance is not None
        if updates is None:  # which old checkpoints lack: then it counts none, with a momentum
            updates = torch.zeros((), dtype=torch.long)
        self._layer = layer
        self._running = (mean, variance, updates)
        self._before = (mean.clone(), variance.clone(), updates.clone())
        self._by_sample = isinstance(layer, _InstanceNorm)
        self._calls: list[Any] = []  # of either kind

    @contextmanager
    def recording(self) -> Iterator[None]:
        layer, momentum, numbers = self._layer, self._layer.momentum, itertools.count()

        def record(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
            self._record(next(numbers), output)

        handle = layer.register_forward_hook(record)
        layer.momentum = 1.0  # the running statistics are then those of the last call alone
        try:
            yield
        finally:
            layer.momentum = momentum
            handle.remove()

    def _record(self, number: int, output: torch.Tensor) -> None:
        mean, variance, _ = self._running
        moments: _Moments | _Averages
        if self._by_sample:
            moments = _Averages(len(output), mean.clone(), variance.clone())
        else:
            n = output.numel() // output.shape[1]
            moments = _Moments(n, mean.clone(), variance * (n - 1))  # that is the unbiased one
        if number == len(self._calls):
            self._calls.append(moments)
        else:
            self._calls[number] = self._calls[number].merged(moments)

    def write(self) -> None:
        mean, variance, updates = self._before
        for moments in self._calls:
            momentum = self._layer.momentum
            if not self._by_sample:
                updates = updates + 1
                if momentum is None:  # the mean over all updates
                    momentum = 1.0 / float(updates)
            factor = momentum or 0.0  # InstanceNorm counts none, and with None keeps what it has
            mean = torch.lerp(mean, moments.mean, factor)
            variance = torch.lerp(variance, moments.variance, factor)
        for buffer, value in zip(self._running, (mean, variance, updates), strict=True):
            buffer.copy_(value)


def _refuse_others(model: nn.Module) -> None:
    """Refuses classes whose own forward would be lost, as those of timm with an activation."""
    kinds = {type(m) for m in model.modules() if isinstance(m, (*_BATCH_NORMS, nn.SyncBatchNorm))}
    for kind in kinds:
        if not kind.forward.__module__.startswith("torch."):
            raise ValueError(
                f"{kind.__name__} inherits from BatchNorm and has a forward of its own, perhaps "
                "with an activation, which GroupNorm would leave out; choose another norm where "
                "the model is built (timm: norm_layer), or use batch_norm='exact'."
            )


def _group_norm(layer: _BatchNorm) -> nn.GroupNorm:
    channels = layer.num_features
    most = 1 if isinstance(layer, nn.BatchNorm1d) else min(GROUPS, channels // 2)
    groups = next((g for g in range(most, 0, -1) if channels % g == 0), 1)
    norm = nn.GroupNorm(groups, channels, eps=layer.eps, affine=False)
    norm.affine, norm.weight, norm.bias = layer.affine, layer.weight, layer.bias
    return norm.train(layer.training)

"""Batches of a data set: a reproducible endless stream for training, pieces for evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import optree
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset
from torch.utils.data import IterableDataset
from torch.utils.data import TensorDataset
from torch.utils.data import default_collate

from bs_optuna.errors import TaskError
from bs_optuna.training.batches import batch_length
from bs_optuna.training.batches import plain
from bs_optuna.training.batches import take


Data = Dataset[Any] | tuple[Any, Any]


def as_data(data: Any, *, name: str) -> Data:
    """What a task gives as data, checked; a pair of tensors is sliced without a loader.

    Raises:
        TaskError: It is neither a pair (inputs, targets) of tensors nor a data set with a length.
    """
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, tuple | list) and len(data) == 2:
        pair = (plain(data[0]), plain(data[1]))
        try:
            batch_length(pair)
        except (TypeError, ValueError) as error:
            raise TaskError(f"{name}: {error}") from None
        return pair
    if isinstance(data, IterableDataset):
        raise TaskError(
            f"{name} is an IterableDataset, {type(data).__name__}; must give sample i as data[i], "
            "so that it can be shuffled: a torch Dataset with __getitem__ and __len__."
        )
    if isinstance(data, Dataset) and hasattr(data, "__len__"):
        if len(data) == 0:
            raise TaskError(f"{name} holds no samples; must hold at least 1.")
        return data
    raise TaskError(
        f"{name} is a {type(data).__name__}; must be a pair (inputs, targets) of tensors or a "
        "torch Dataset that has a length and yields such pairs."
    )


def length(data: Data) -> int:
    """Number of samples."""
    return batch_length(data) if isinstance(data, tuple) else len(data)  # type: ignore[arg-type]


def training_batches(
    data: Data, *, batch_size: int, seed: int, skip: int = 0
) -> Iterator[tuple[Any, Any]]:
    """Full batches without end: each pass over the data in a new order, nothing left out.

    What is left of one pass begins the first batch of the next, so a batch always holds
    ``batch_size`` samples. The first ``skip`` batches are left out and never read.
    """
    indices = itertools.islice(_index_batches(length(data), batch_size, seed), skip, None)
    if isinstance(data, tuple):
        return (take(data, batch) for batch in indices)
    sampler = (batch.tolist() for batch in indices)
    # Begun now and not at the first batch: a loader that begins draws a random number.
    return iter(DataLoader(data, batch_sampler=sampler, collate_fn=_collate))


def evaluation_batches(data: Data, *, batch_size: int) -> Iterator[tuple[Any, Any]]:
    """Every sample once, in order; the last piece may be smaller."""
    if isinstance(data, tuple):
        for start in range(0, length(data), batch_size):
            yield take(data, slice(start, start + batch_size))
    else:
        yield from DataLoader(data, batch_size=batch_size, collate_fn=_collate)


def first_samples(data: Data, count: int) -> tuple[Any, Any]:
    """The first ``count`` samples, or all of a smaller data set.

    Raises:
        TaskError: The data set yields something that is no pair of pytrees of tensors.
    """
    samples = next(evaluation_batches(data, batch_size=min(count, length(data))))
    try:
        batch_length(samples)
    except (TypeError, ValueError) as error:
        raise TaskError(str(error)) from None
    return samples


def bytes_per_sample(data: Data, device: torch.device) -> int:
    """What a sample takes of a device's memory before it is moved there: 0 if it lies elsewhere."""
    leaves: list[torch.Tensor] = optree.tree_leaves(first_samples(data, 1))  # type: ignore[arg-type]
    return sum(leaf.nbytes for leaf in leaves if leaf.device.type == device.type)


def _index_batches(samples: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.int64)
    while True:
        while len(left) < batch_size:
            left = torch.cat([left, torch.randperm(samples, generator=generator)])
        yield left[:batch_size]
        left = left[batch_size:]


def _collate(samples: list[Any]) -> tuple[Any, Any]:
    """Stacks samples leaf by leaf; tuples stay tuples, which the model is called with apart."""
    first = samples[0]
    if not (isinstance(first, tuple | list) and len(first) == 2):
        of = f" of {len(first)}" if isinstance(first, tuple | list) else ""
        raise TaskError(
            f"The data set yields a {type(first).__name__}{of}; must yield pairs (inputs, targets)."
        )
    inputs, targets = (
        optree.tree_map(_stacked, *parts)
        for parts in zip(*(map(plain, sample) for sample in samples), strict=True)
    )
    return inputs, targets


def _stacked(*leaves: Any) -> Any:
    try:
        return default_collate(list(leaves))
    except RuntimeError:
        shapes = sorted({tuple(leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor)})
        if len(shapes) < 2:
            raise
        raise TaskError(
            f"The data set yields tensors of the shapes {shapes[0]} and {shapes[-1]} in the same "
            "place, which cannot be put into one batch; pad them to one shape (see lengths, trim "
            "and count)."
        ) from None

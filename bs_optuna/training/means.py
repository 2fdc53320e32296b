"""Warns of a loss or metric that is no mean, which the parts of a piece of data show."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import nn

from bs_optuna.training.batches import Batch
from bs_optuna.training.batches import batch_length
from bs_optuna.training.batches import call_model
from bs_optuna.training.batches import take
from bs_optuna.training.cutting import Count
from bs_optuna.training.oom import classify
from bs_optuna.training.random_states import kept_random_states


Function = Callable[[Any, Any], Any]
FEWEST_SAMPLES = 4
FEW_SAMPLES = 8
# Relative. A model rounds less, but for the shortest types of a GPU.
TOLERANCE = 1e-3
CLOSE = 1e-4  # of the same outputs, of which sums in single precision round less by far
ROUNDINGS = 4  # of the lowest precision: one for the whole and each half, and one to spare
IGNORED = -100  # PyTorch's ignore_index
# Python's own filter forgets what it has shown whenever anything suspends it, as Optuna does.
_told: set[str] = set()


def judged(
    functions: Mapping[str, Function],
    values: Mapping[str, float],
    batch: Batch,
    outputs: Any,
    *,
    model: nn.Module,
    count: Count | None,
    device: torch.device,
) -> bool:
    """Warns, once in this process, of each function that parts of a piece show to be no mean.

    Neither random states nor what the functions keep are changed, and one that refuses parts of a
    piece is taken for a mean; out of memory is raised.

    Args:
        functions: The loss, as ``"loss"``, and the metrics.
        values: What they are for the piece.
        batch: The piece, inputs and targets.
        outputs: Of the model.
        model: Gives those of the parts where the outputs cannot be cut, each leaf of which then
            has not the samples first: what the models of transformers return, for instance.
        count: What the means are taken over, if not the samples.
        device: Whose random states are put back.

    Returns:
        Whether another piece would tell no more.
    """
    if count is None and _padded(batch[1]) and _leaves_out(functions["loss"], batch[1], outputs):
        _tell(
            f"The targets hold {IGNORED}, which the loss leaves out of its mean, not as often in "
            "each sample: microbatches with more of them would count as much as others. Remedy: "
            "pass what the loss is divided by, "
            f"count=lambda inputs, targets: (targets != {IGNORED}).sum()."
        )
    try:
        samples = batch_length(batch)
        if samples < FEWEST_SAMPLES or not _differ(batch[1]):
            return False
    except Exception as error:
        _raise_out_of_memory(error)
        return True
    wrong: set[str] = set()
    with kept_random_states(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metrics that expect more than one sample
        try:
            halves = _halves(model, batch, outputs, samples)
            wrong.update(_no_means(functions, halves, values, count))
            wrong.update(_no_means(functions, _singles(model, batch, outputs, samples), {}, count))
        except Exception as error:
            _raise_out_of_memory(error)
    for name in functions:
        if name in wrong:
            _warn(name, counted=count is not None)
    return True


@dataclass(frozen=True)
class _Cut:
    """A piece and its parts, each with the outputs of the model.

    Attributes:
        whole: The piece.
        again: The outputs of the whole once more, made anew if the model was asked.
        parts: What it was cut into.
        tolerance: For the difference between the whole and the mean of its parts, relative.
    """

    whole: tuple[Batch, Any]
    again: Any
    parts: list[tuple[Batch, Any]]
    tolerance: float


def _halves(model: nn.Module, batch: Batch, outputs: Any, samples: int) -> _Cut:
    places = [slice(0, samples // 2), slice(samples // 2, None)]
    return _cut(model, batch, outputs if _has(outputs, samples) else None, places, TOLERANCE)


def _singles(model: nn.Module, batch: Batch, outputs: Any, samples: int) -> _Cut:
    """A few samples from all over the piece: in its halves, what samples weigh averages out."""
    few = min(samples, FEW_SAMPLES)
    chosen = torch.linspace(0, samples - 1, few).long()
    cut = _has(outputs, samples)
    tolerance = CLOSE if cut else TOLERANCE  # the model rounds otherwise for another batch
    chosen_outputs = take(outputs, chosen) if cut else None
    places = [slice(k, k + 1) for k in range(few)]
    return _cut(model, take(batch, chosen), chosen_outputs, places, tolerance)


def _cut(
    model: nn.Module, batch: Batch, outputs: Any, places: list[slice], tolerance: float
) -> _Cut:
    """The batch cut at some places.

    Where the model is asked for the outputs, which are None then, it makes all of them anew: one
    that draws random numbers then differs from itself, which is seen.
    """
    parts = [take(batch, place) for place in places]
    if outputs is None:
        outputs, again = call_model(model, batch[0]), call_model(model, batch[0])
        of_parts = [call_model(model, part[0]) for part in parts]
    else:
        again = outputs
        of_parts = [take(outputs, place) for place in places]
    return _Cut((batch, outputs), again, list(zip(parts, of_parts, strict=True)), tolerance)


def _has(outputs: Any, samples: int) -> bool:
    """Whether outputs can be cut: each leaf of them has the samples first."""
    try:
        return batch_length(outputs) == samples
    except (TypeError, ValueError):
        return False


def _padded(targets: Any) -> bool:
    """Whether samples differ in how many of their targets cross_entropy ignores by default."""
    for leaf in optree.tree_leaves(targets):
        if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.int64 and leaf.ndim > 0:
            ignored = (leaf == IGNORED).reshape(len(leaf), -1).sum(1)
            if bool((ignored != ignored[0]).any()):
                return True
    return False


def _leaves_out(loss: Function, targets: Any, outputs: Any) -> bool:
    """Whether a loss divides by what is not ignored: of nothing else it is not a number.

    Its values may not show it, as all tokens cost alike before anything is learned.
    """
    nothing = optree.tree_map(
        lambda leaf: torch.full_like(leaf, IGNORED) if leaf.dtype == torch.int64 else leaf, targets
    )
    try:
        if isinstance(loss, nn.Module):
            loss = copy.deepcopy(loss, {id(p): p for p in loss.parameters()})
        return math.isnan(float(loss(outputs, nothing)))
    except Exception as error:
        _raise_out_of_memory(error)
        return False


def _differ(targets: Any) -> bool:
    """Class weights, say, do not show in samples of a single class."""
    leaves = optree.tree_leaves(targets)
    return not leaves or any(bool((leaf[1:] != leaf[:-1]).any()) for leaf in leaves)


def _no_means(
    functions: Mapping[str, Function], cut: _Cut, values: Mapping[str, float], count: Count | None
) -> list[str]:
    """The names of the functions that are certainly none; the values are those of the whole."""
    return [
        name
        for name, function in functions.items()
        if not _is_mean(function, values.get(name), cut, count)
    ]


def _is_mean(function: Function, value: float | None, cut: _Cut, count: Count | None) -> bool:
    """False only where it is certain that it is none."""
    try:
        if isinstance(function, nn.Module):  # all that it holds, but for the parameters
            function = copy.deepcopy(function, {id(p): p for p in function.parameters()})
        (_, targets), outputs = cut.whole
        if value is None:
            value = float(function(outputs, targets))
        found, weights = [], []
        for part, part_outputs in cut.parts:
            weight = float(count(*part)) if count else float(batch_length(part))
            if weight > 0:  # the mean over nothing is no number
                weights.append(weight)
                found.append(function(part_outputs, part[1]))
        tolerance = _tolerance([*found, *optree.tree_leaves(outputs)], least=cut.tolerance)
        means = list(map(float, found))
        mean = sum(m * w for m, w in zip(means, weights, strict=True)) / sum(weights)
        allowed = tolerance * max(map(abs, (value, *means)))
        if not abs(mean - value) > allowed:  # nor if one is not finite
            return True
        # One that draws random numbers, or remembers, differs from itself.
        return abs(float(function(cut.again, targets)) - value) > allowed
    except Exception as error:
        _raise_out_of_memory(error)
        return True


def _raise_out_of_memory(error: Exception) -> None:
    if classify(error) is not None:
        raise error


def _tolerance(results: list[Any], *, least: float) -> float:
    rounded = [
        torch.finfo(result.dtype).eps
        for result in results
        if isinstance(result, torch.Tensor) and result.is_floating_point()
    ]
    return max(least, ROUNDINGS * max(rounded, default=0.0))


def _warn(name: str, *, counted: bool) -> None:
    over = "what count counts" if counted else "the samples"
    what = "loss" if name == "loss" else f"metric {name!r}"
    gradient = ", as do its gradients on the microbatch" if name == "loss" else ""
    if counted:
        remedy = f"return the mean over {over}, sums divided by count(inputs, targets)."
    elif name == "loss":
        remedy = (
            "with class weights or padding pass what the loss is divided by, count=lambda inputs, "
            "targets: weight[targets].sum(); instead of a sum return the mean; a loss that "
            "compares samples is another one on a part of a batch: search batch sizes that fit."
        )
    else:
        remedy = (
            "choose as objective something that is a mean over the samples, such as the squared "
            "error for R2 or the loss for AUC and F1."
        )
    text = (
        f"The {what} is no mean over {over}: of data in pieces it is not the mean over the pieces. "
        f"So its values depend on how large a piece of the data is evaluated at a time, and hence "
        f"on batch size and memory{gradient}. Remedy: {remedy}"
    )
    _tell(text)


def _tell(text: str) -> None:
    if text not in _told:
        _told.add(text)
        warnings.warn(text, stacklevel=5)

"""Warns of a loss or metric that is no mean, which the two halves of a piece of data show."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from collections.abc import Mapping
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
# Relative. Sums in single precision round less by far, and a smaller difference decides nothing.
TOLERANCE = 1e-3
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
    """Warns, once in this process, of each function that the halves show to be no mean.

    Neither random states nor what the functions keep are changed, and one that refuses half a piece
    is taken for a mean; out of memory is raised.

    Args:
        functions: The loss, as ``"loss"``, and the metrics.
        values: What they are for the piece.
        batch: The piece, inputs and targets.
        outputs: Of the model.
        model: Gives those of the halves where the outputs cannot be cut, each leaf of which then
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
    with kept_random_states(device):
        try:
            outputs, halves = _halves(model, batch, outputs, samples)
            for name, function in functions.items():
                if not _is_mean(function, values[name], batch, outputs, halves, count):
                    _warn(name, counted=count is not None)
        except Exception as error:
            _raise_out_of_memory(error)
    return True


def _halves(
    model: nn.Module, batch: Batch, outputs: Any, samples: int
) -> tuple[Any, list[tuple[Batch, Any]]]:
    """The outputs, and the two halves of a piece, each with its own.

    Those of a model that is asked for them are all made anew: one that draws random numbers then
    differs from itself, which is seen.
    """
    slices = (slice(0, samples // 2), slice(samples // 2, None))
    parts = [take(batch, half) for half in slices]
    try:
        cut = batch_length(outputs) == samples
    except (TypeError, ValueError):
        cut = False
    if cut:
        return outputs, [(p, take(outputs, half)) for p, half in zip(parts, slices, strict=True)]
    again = call_model(model, batch[0])
    return again, [(part, call_model(model, part[0])) for part in parts]


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


def _is_mean(
    function: Function,
    value: float,
    batch: Batch,
    outputs: Any,
    halves: list[tuple[Batch, Any]],
    count: Count | None,
) -> bool:
    """False only where it is certain that it is none."""
    try:
        if isinstance(function, nn.Module):  # all that it holds, but for the parameters
            function = copy.deepcopy(function, {id(p): p for p in function.parameters()})
        found, weights = [], []
        for part, part_outputs in halves:
            weights.append(float(count(*part)) if count else float(batch_length(part)))
            if weights[-1] == 0:
                return True
            found.append(function(part_outputs, part[1]))
        tolerance = _tolerance([*found, *optree.tree_leaves(outputs)])
        first, second = map(float, found)
        mean = (first * weights[0] + second * weights[1]) / sum(weights)
        allowed = tolerance * max(map(abs, (value, first, second)))
        if not abs(mean - value) > allowed:  # nor if one is not finite
            return True
        # One that draws random numbers, or remembers, differs from itself.
        return abs(float(function(outputs, batch[1])) - value) > allowed
    except Exception as error:
        _raise_out_of_memory(error)
        return True


def _raise_out_of_memory(error: Exception) -> None:
    if classify(error) is not None:
        raise error


def _tolerance(results: list[Any]) -> float:
    rounded = [
        torch.finfo(result.dtype).eps
        for result in results
        if isinstance(result, torch.Tensor) and result.is_floating_point()
    ]
    return max(TOLERANCE, ROUNDINGS * max(rounded, default=0.0))


def _warn(name: str, *, counted: bool) -> None:
    over = "what count counts" if counted else "the samples"
    what = "loss" if name == "loss" else f"metric {name!r}"
    gradient = ", as do its gradients on the microbatch" if name == "loss" else ""
    if counted:
        remedy = f"return the mean over {over}, sums divided by count(inputs, targets)."
    elif name == "loss":
        remedy = (
            "with class weights or padding pass what the loss is divided by, count=lambda inputs, "
            "targets: weight[targets].sum(); instead of a sum return the mean."
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

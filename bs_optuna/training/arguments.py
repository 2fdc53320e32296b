"""What AccumulatedBackward refuses to be made with."""

from __future__ import annotations

from numbers import Integral

from torch import nn

from bs_optuna.science.noise_scale import NoiseScale
from bs_optuna.training.ranks import refuse_wrapped


def check_model(model: object) -> None:
    """Refuses what is no module, or one that holds collectives.

    Raises:
        TypeError: It is no module.
        ConfigError: It is wrapped for several ranks.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r:.60}; must be an nn.Module.")
    refuse_wrapped(model)


def check_sizes(microbatch_size: object, microbatch_tokens: int | None) -> None:
    """Refuses sizes that are no numbers, and two of them.

    Raises:
        ValueError: ``microbatch_size`` is neither a whole number of at least 1 nor ``"auto"``, or
            both are given.
    """
    if microbatch_size == "auto":
        return
    whole = isinstance(microbatch_size, Integral) and not isinstance(microbatch_size, bool)
    if not whole or microbatch_size < 1:  # type: ignore[operator]
        raise ValueError(
            f"microbatch_size={microbatch_size!r}; must be a whole number of at least 1, or "
            "'auto' to find it."
        )
    if microbatch_tokens is not None:
        raise ValueError(
            f"microbatch_size={microbatch_size} and microbatch_tokens={microbatch_tokens}; "
            "give one of them."
        )


def check_noise_scale(noise_scale: object, reduction: str, process_group: object) -> None:
    """Refuses to measure the noise scale where that is not known how.

    Raises:
        TypeError: It is no `NoiseScale`.
        ValueError: Losses are sums, whose gradients grow with the microbatch, or other ranks hold
            a part of the batch.
    """
    if noise_scale is None:
        return
    if not isinstance(noise_scale, NoiseScale):
        raise TypeError(f"noise_scale={noise_scale!r:.60}; must be a bs_optuna.NoiseScale().")
    if reduction == "sum":
        raise ValueError("noise_scale and reduction='sum'; needs a loss that is a mean.")
    if process_group is not None:
        raise ValueError("noise_scale and process_group; measure it on one rank by itself.")


def check_loss(loss_fn: object, reduction: str) -> None:
    """Refuses a loss that says itself that it is another one than is taken for granted.

    What a subclass makes of ``reduction`` is its own business, as in a focal loss.

    Raises:
        ValueError: It is a class, or one of PyTorch's losses with another ``reduction``.
    """
    if isinstance(loss_fn, type):
        name = loss_fn.__name__
        raise ValueError(f"the loss is the class {name}; must be one of its kind: {name}().")
    loss_fn = getattr(loss_fn, "_orig_mod", loss_fn)  # of a compiled one
    if not type(loss_fn).__module__.startswith("torch.nn."):
        return
    own = getattr(loss_fn, "reduction", reduction)
    if own in ("none", "mean", "sum") and own != reduction:
        raise ValueError(
            f"the loss has reduction={own!r}, not {reduction!r}, by which microbatches are weighed"
            f"; make it with reduction={reduction!r}."
        )

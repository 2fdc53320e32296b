"""Cutting: how AccumulatedBackward makes microbatches of a batch, and what each of them counts."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any
from typing import Literal

import torch

from bs_optuna.science.accumulation import AccumulationPlan
from bs_optuna.science.accumulation import TokenPlan
from bs_optuna.science.accumulation import weights
from bs_optuna.training.batches import Batch
from bs_optuna.training.batches import batch_length
from bs_optuna.training.batches import refuse_computed
from bs_optuna.training.batches import take


Plan = AccumulationPlan | TokenPlan
Count = Callable[[Any, Any], int | torch.Tensor]
Lengths = Callable[[Any, Any], Sequence[int] | torch.Tensor]
Trim = Callable[[Any, Any, int], Batch]


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """See AccumulatedBackward for what the attributes mean."""

    reduction: Literal["mean", "sum"]
    count: Count | None
    microbatch_tokens: int | None
    lengths: Lengths | None
    trim: Trim | None

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction={self.reduction!r}; must be 'mean' or 'sum'.")
        if self.reduction == "sum" and self.count is not None:
            raise ValueError("count is for reduction='mean' only; a sum needs no weights.")
        tokens = self.microbatch_tokens
        if tokens is None:
            if self.lengths is not None or self.trim is not None:
                raise ValueError("lengths and trim are for a budget only; give microbatch_tokens.")
        elif tokens < 1:
            raise ValueError(f"microbatch_tokens={tokens}; must be at least 1.")
        elif self.lengths is None and self.count is None:
            raise ValueError(f"microbatch_tokens={tokens}; needs lengths, or count, to measure by.")

    @property
    def setting(self) -> str:
        """The name of what limits a microbatch."""
        return "microbatch_size" if self.microbatch_tokens is None else "microbatch_tokens"

    def plans(self, batch: Batch) -> Callable[[int | None], Plan]:
        """The cut of a batch for each limit.

        Raises:
            ValueError: The tensors differ in their number of samples, or were computed.
            TypeError: Something is no tensor with samples.
        """
        samples = batch_length(batch)
        refuse_computed(batch)
        if self.microbatch_tokens is None:
            return lambda limit: AccumulationPlan.within(samples, limit)
        lengths = self._lengths(batch, samples)
        return lambda limit: TokenPlan(lengths, limit or self.microbatch_tokens or 1)

    def microbatches(
        self, plan: Plan, batch: Batch, *, whole: bool = True
    ) -> tuple[list[tuple[float, Batch]], float]:
        """Each microbatch after its weight, and what the mean of all of them is taken over.

        Those without a target are left out.

        Args:
            plan: A cut of the batch.
            batch: The pair of inputs and targets.
            whole: Whether there is nothing else; a part of a batch may be without a target.

        Raises:
            ValueError: The whole batch is without a target.
        """
        if plan.accumulation_steps > 1:
            if isinstance(plan, TokenPlan):
                # Each by itself: inputs that require grad would share a node of one graph.
                parts = [take(batch, torch.tensor(part)) for part in plan.parts]
            else:
                parts = [take(batch, part) for part in plan.slices]  # views, not copies
        elif self.count is None and self.trim is None:
            return [(1.0, batch)], plan.batch_size
        else:
            parts = [batch]
        counts = self._counts(parts, plan)
        held = sum(counts)
        if not whole and held == 0:
            return [], 0.0
        shares = (1.0,) * len(parts) if self.reduction == "sum" else weights(counts)
        if self.trim is not None and isinstance(plan, TokenPlan):
            parts = [self.trim(p[0], p[1], n) for p, n in zip(parts, plan.longest, strict=True)]
        # The mean over nothing is NaN, and would spoil the sum.
        return [pair for pair in zip(shares, parts, strict=True) if pair[0] != 0], held

    def _counts(self, parts: list[Batch], plan: Plan) -> Sequence[float]:
        """What the mean of each part is taken over."""
        if self.count is None:
            return plan.sizes
        return [counted(self.count, part) for part in parts]

    def _lengths(self, batch: Batch, samples: int) -> tuple[int, ...]:
        if self.lengths is None:
            assert self.count is not None
            singles = (take(batch, slice(i, i + 1)) for i in range(samples))
            return tuple(int(counted(self.count, single)) for single in singles)
        return sample_lengths(self.lengths, batch)


def counted(count: Count, batch: Batch) -> float:
    """What the mean over a batch is taken over.

    Raises:
        TypeError: ``count`` returned something else than one number.
    """
    found = count(*batch)
    if isinstance(found, torch.Tensor) and found.numel() != 1:
        described = f"a tensor of shape {tuple(found.shape)}"
    elif isinstance(found, torch.Tensor | Real) or hasattr(found, "__float__"):
        return float(found)
    else:
        described = f"a {type(found).__name__}"
    raise TypeError(
        f"count returned {described}; must return one number, what the mean over all of its "
        "samples is taken over, such as (targets != -100).sum()."
    )


def sample_lengths(lengths: Lengths, batch: Batch) -> tuple[int, ...]:
    """The length of each sample of a batch.

    Raises:
        ValueError: There are not as many of them as samples.
    """
    found = tuple(map(int, torch.as_tensor(lengths(*batch)).tolist()))
    if len(found) != (samples := batch_length(batch)):
        raise ValueError(
            f"lengths gave {len(found)} numbers for {samples} samples; must be one of each."
        )
    return found

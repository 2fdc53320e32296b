"""Cutting: how AccumulatedBackward makes microbatches of a batch, and what each of them counts."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from typing import Literal

import torch

from bs_optuna.science.accumulation import AccumulationPlan
from bs_optuna.science.accumulation import TokenPlan
from bs_optuna.science.accumulation import weights
from bs_optuna.training.batches import Batch
from bs_optuna.training.batches import batch_length
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
        """The cut of a batch for each limit."""
        samples = batch_length(batch)
        if self.microbatch_tokens is None:
            return lambda limit: AccumulationPlan.within(samples, limit)
        lengths = self._lengths(batch, samples)
        return lambda limit: TokenPlan(lengths, limit or self.microbatch_tokens or 1)

    def microbatches(self, plan: Plan, batch: Batch) -> list[tuple[float, Batch]]:
        """Each microbatch after its weight; those without a target are left out.

        Raises:
            ValueError: The whole batch is without a target.
        """
        if plan.accumulation_steps > 1:
            if isinstance(plan, TokenPlan):
                batch = take(batch, torch.tensor([i for part in plan.parts for i in part]))
            parts = [take(batch, part) for part in plan.slices]  # views, not copies
        elif self.count is None and self.trim is None:
            return [(1.0, batch)]
        else:
            parts = [batch]
        shares = self._weights(parts, plan)
        if self.trim is not None and isinstance(plan, TokenPlan):
            parts = [self.trim(p[0], p[1], n) for p, n in zip(parts, plan.longest, strict=True)]
        # The mean over nothing is NaN, and would spoil the sum.
        return [pair for pair in zip(shares, parts, strict=True) if pair[0] != 0]

    def _weights(self, parts: list[Batch], plan: Plan) -> Sequence[float]:
        if self.reduction == "sum":
            return (1.0,) * len(parts)
        if self.count is None:
            return weights(plan.sizes)
        return weights([float(self.count(*part)) for part in parts])

    def _lengths(self, batch: Batch, samples: int) -> tuple[int, ...]:
        if self.lengths is None:
            assert self.count is not None
            return tuple(int(self.count(*take(batch, slice(i, i + 1)))) for i in range(samples))
        lengths = tuple(map(int, torch.as_tensor(self.lengths(*batch)).tolist()))
        if len(lengths) != samples:
            raise ValueError(
                f"lengths gave {len(lengths)} numbers for {samples} samples; must be one of each."
            )
        return lengths

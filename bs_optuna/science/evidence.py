"""What another study has learned about its ridge, as far as a new belief can use it."""

from __future__ import annotations

from typing import Protocol


class RidgeEvidence(Protocol):
    """What has been learned about a ridge; a Recommendation is one. Intervals hold 90 %."""

    @property
    def batch_size(self) -> int:
        """Samples per optimizer step."""

    @property
    def learning_rate(self) -> float:
        """The best learning rate for it."""

    @property
    def learning_rate_interval(self) -> tuple[float, float]:
        """Where that lies."""

    @property
    def momentum(self) -> float | None:
        """The momentum that goes with it, where that was tuned."""

    @property
    def momentum_exponent(self) -> float:
        """Power of 1 - m that the best learning rate was taken to be proportional to."""

    @property
    def exponent(self) -> float:
        """a, the slope of ln(learning rate) over ln(batch size) where batches are small."""

    @property
    def exponent_interval(self) -> tuple[float, float]:
        """Where it lies."""

    @property
    def critical_batch_size(self) -> float:
        """Critical batch size, in samples."""

    @property
    def critical_batch_size_interval(self) -> tuple[float, float]:
        """Where it lies."""

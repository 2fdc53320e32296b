"""Which microbatch is fast enough: the smallest whose throughput is close to the best.

B: samples per optimizer step (batch_size); b: samples in a microbatch.
"""

from __future__ import annotations

from collections.abc import Mapping


# What a smaller microbatch may be slower than the best.
TOLERANCE = 0.03


def samples_per_second(
    batch_size: int, microbatch_size: int, *, backward_seconds: float, update_seconds: float
) -> float:
    """Throughput of full training steps, B / (B / b * backward + update).

    The larger the batch, the less the update counts and the more a slow microbatch does; so what is
    within a tolerance of the best for one batch size is so for all smaller ones.

    Args:
        batch_size: B.
        microbatch_size: b.
        backward_seconds: Of forward and backward on one microbatch.
        update_seconds: Of the optimizer's step.
    """
    microbatches = batch_size / microbatch_size
    return batch_size / (microbatches * backward_seconds + update_seconds)


def smallest_fast(rates: Mapping[int, float], *, tolerance: float = TOLERANCE) -> int:
    """The smallest microbatch size whose throughput is within a tolerance of the best.

    Beyond it a larger microbatch takes memory and gives next to nothing.

    Args:
        rates: Throughput by microbatch size; at least one.
        tolerance: Part of the best throughput that may be lost.
    """
    enough = (1 - tolerance) * max(rates.values())
    return min(size for size, rate in rates.items() if rate >= enough)

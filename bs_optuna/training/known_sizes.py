"""What a trial leaves behind about memory, and what all trials together know."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bs_optuna.sampling import attributes
from bs_optuna.science.memory import MicrobatchBounds
from bs_optuna.training.loop import TrainingRun


@dataclass(frozen=True)
class KnownSizes:
    """Sizes seen in trials of the same memory key.

    Attributes:
        microbatch: What fits in training, and what does not.
        evaluation: Samples in a piece of an evaluation that fits where a larger one did not.
    """

    microbatch: MicrobatchBounds
    evaluation: int | None


def learned(
    run: TrainingRun, memory_key: str, *, elsewhere: Sequence[int] = ()
) -> dict[str, int | str | None]:
    """The attributes that say what a run has learned.

    Args:
        run: While it trains or after it.
        memory_key: Of its task and device.
        elsewhere: Microbatch sizes that have failed before or beside the run.
    """
    # What ran in the end has failed because of a spike that passed.
    failed = [size for size in (*run.failed_sizes, *elsewhere) if size > run.fits]
    return {
        attributes.MEMORY_KEY: memory_key,
        attributes.MICROBATCH_FITS: run.fits,
        attributes.MICROBATCH_FAILS: min(failed, default=None),
        attributes.EVALUATION_FITS: run.evaluation_fits,
    }


def known_sizes(trials: Iterable[Mapping[str, Any]], memory_key: str) -> KnownSizes:
    """What trials with these attributes know together; those of another key know nothing."""
    alike = [stored for stored in trials if stored.get(attributes.MEMORY_KEY) == memory_key]
    bounds = [_bounds(stored) for stored in alike]
    pieces = (stored.get(attributes.EVALUATION_FITS) for stored in alike)
    return KnownSizes(
        MicrobatchBounds.merged(bounds),
        min((size for size in pieces if size is not None), default=None),
    )


def _bounds(stored: Mapping[str, Any]) -> MicrobatchBounds:
    fits, fails = stored.get(attributes.MICROBATCH_FITS, 0), stored.get(attributes.MICROBATCH_FAILS)
    # A failure is stored at once, and counts no longer when that size has run since.
    return MicrobatchBounds(fits, fails if fails is not None and fails > fits else None)

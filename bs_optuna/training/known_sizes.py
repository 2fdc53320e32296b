"""What a trial leaves behind about memory, and what all trials together know."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from bs_optuna.sampling import attributes
from bs_optuna.science.memory import MicrobatchBounds
from bs_optuna.training.search import Seen


@dataclass(frozen=True)
class Claim:
    """A microbatch size that a running trial is trying, which has neither fitted nor failed yet.

    Attributes:
        trial: Number of the trial.
        size: Samples in the microbatch.
    """

    trial: int
    size: int


@dataclass(frozen=True)
class KnownSizes:
    """Sizes seen in trials of the same memory key.

    Attributes:
        microbatch: What fits in training, and what does not.
        evaluation: Samples in a piece of an evaluation that fits where a larger one did not.
        claims: What is being tried in training.
        deaths: Whether a worker was killed.
        deadly: Whether what does not fit in training is known from that.
        early_deaths: Whether one was before it trained, perhaps by what measures memory.
    """

    microbatch: MicrobatchBounds
    evaluation: int | None
    claims: tuple[Claim, ...] = ()
    deaths: bool = False
    deadly: bool = False
    early_deaths: bool = False

    def start(self, most: int, *, predicted: int | None) -> int:
        """The microbatch size to begin with; see `MicrobatchBounds.start`.

        Once a size has killed a worker and a smaller one has fitted, nothing beyond that is tried:
        it would cost another worker, and a prediction that was wrong before may be so again.

        Args:
            most: Most samples that it may hold.
            predicted: The largest size that is predicted to fit; None if nothing is.
        """
        if self.deadly and self.microbatch.fits > 0:
            return min(most, self.microbatch.fits)
        return self.microbatch.start(most, predicted=predicted)

    def leaves_open(self, batch_size: int) -> bool:
        """Whether a batch of a size, as a whole, has neither fitted nor is known not to."""
        return self.microbatch.fails is None and self.microbatch.fits < batch_size


NOTHING_KNOWN = KnownSizes(MicrobatchBounds(), None)


def learned(
    run: Seen, memory_key: str, *, elsewhere: Sequence[int] = ()
) -> dict[str, int | str | None]:
    """The attributes that say what a run has learned.

    Args:
        run: While it trains or after it.
        memory_key: Of its task and device.
        elsewhere: Microbatch sizes that have failed before or beside the run.
    """
    # What ran in the end has failed because of a spike that passed. So has, among others, what is
    # less than half of what had run before: memory does not shrink to a part in one training.
    spikes = max(run.fits, run.ran // 2)
    failed = [size for size in (*run.failed_sizes, *elsewhere) if size > spikes]
    return {
        attributes.MEMORY_KEY: memory_key,
        attributes.MICROBATCH_FITS: run.fits,
        attributes.MICROBATCH_FAILS: min(failed, default=None),
        attributes.EVALUATION_FITS: run.evaluation_fits,
    }


def known_sizes(
    trials: Sequence[FrozenTrial], memory_key: str, *, batch_size: int, predicted: bool = False
) -> KnownSizes:
    """What trials know together; those of another key know nothing.

    Args:
        trials: Those of the study.
        memory_key: Of the task and device.
        batch_size: Samples per optimizer step. A larger batch that did not fit even sample by
            sample says nothing of it: the batch itself takes memory, and so do sparse gradients.
        predicted: Whether it is predicted what fits beside that batch. Then what has fitted beside
            one of less than half its size does not count: it may be too much.
    """
    alike = [trial for trial in trials if trial.user_attrs.get(attributes.MEMORY_KEY) == memory_key]
    bounds = [_said_of(batch_size, trial, predicted=predicted) for trial in alike]
    pieces = (trial.user_attrs.get(attributes.EVALUATION_FITS) for trial in alike)
    merged = MicrobatchBounds.merged(bounds)
    killed = {trial.user_attrs.get(attributes.KILLED_MICROBATCH) for trial in alike}
    return KnownSizes(
        merged,
        min((size for size in pieces if size is not None), default=None),
        tuple(_claims(alike)),
        deaths=any(attributes.KILLED_BY in trial.user_attrs for trial in alike),
        deadly=merged.fails is not None and merged.fails in killed,
        early_deaths=any(attributes.KILLED_EARLY in trial.user_attrs for trial in alike),
    )


def _claims(trials: Iterable[FrozenTrial]) -> Iterator[Claim]:
    for trial in trials:
        size = trial.user_attrs.get(attributes.MICROBATCH_TRIED)
        if size is not None and trial.state == TrialState.RUNNING:
            bounds = _bounds(trial.user_attrs)
            if bounds.fits < size and (bounds.fails is None or size < bounds.fails):
                yield Claim(trial.number, size)


def _said_of(batch_size: int, trial: FrozenTrial, *, predicted: bool) -> MicrobatchBounds:
    bounds = _bounds(trial.user_attrs)
    other = trial.params.get("batch_size", batch_size)
    if bounds.sample_fails and other > batch_size:
        return replace(bounds, fails=None)
    if predicted and 2 * other < batch_size:
        return replace(bounds, fits=0)
    return bounds


def _bounds(stored: Mapping[str, Any]) -> MicrobatchBounds:
    fits, fails = stored.get(attributes.MICROBATCH_FITS, 0), stored.get(attributes.MICROBATCH_FAILS)
    # A failure is stored at once, and counts no longer when that size has run since.
    return MicrobatchBounds(fits, fails if fails is not None and fails > fits else None)

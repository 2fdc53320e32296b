"""The attempts of a trial whose worker processes died, and what the next one must know."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bs_optuna.sampling import attributes
from bs_optuna.training.checkpoint import CheckpointFile


# So often a setting may take its worker down; then it counts as one that does not fit.
MAX_ATTEMPTS = 3
# What all attempts of a trial share or add to.
_INHERITED = (
    attributes.FIRST_ATTEMPT,
    attributes.ATTEMPT,
    attributes.KILLED_BY,
    attributes.KILLED_MICROBATCH,
    attributes.KILLED_EVALUATION,
    attributes.KILLED_EARLY,
)


@dataclass(frozen=True)
class Attempt:
    """One attempt of a trial.

    Attributes:
        first: Number of the trial that was the first attempt; all share its seed.
        number: 1 for the first attempt.
        killed_by: Signal that ended the attempt before; None if there was none.
        killed_microbatch: Microbatch size of the last attempt that ended in training, where known.
        killed_evaluation: Samples in a piece of the last evaluation that an attempt ended in.
        folder: Where checkpoints are; None if none are written.
        checkpoint: Name of the checkpoint of all attempts.
    """

    first: int
    number: int
    killed_by: str | None
    killed_microbatch: int | None
    killed_evaluation: int | None
    folder: Path | None
    checkpoint: str

    @classmethod
    def read(cls, number: int, stored: Mapping[str, Any], *, folder: Path | None) -> Attempt:
        """The attempt that a trial is.

        Args:
            number: Number of the trial.
            stored: Its user attributes.
            folder: Where checkpoints are; None to write none.
        """
        return cls(
            first=stored.get(attributes.FIRST_ATTEMPT, number),
            number=stored.get(attributes.ATTEMPT, 1),
            killed_by=stored.get(attributes.KILLED_BY),
            killed_microbatch=stored.get(attributes.KILLED_MICROBATCH),
            killed_evaluation=stored.get(attributes.KILLED_EVALUATION),
            folder=folder,
            # Named by chance: no other study's file can be taken for it.
            checkpoint=stored.get(attributes.CHECKPOINT) or f"{uuid.uuid4().hex}.pt",
        )

    @property
    def file(self) -> CheckpointFile | None:
        """The checkpoint, None if none is written."""
        return None if self.folder is None else CheckpointFile(self.folder / self.checkpoint)

    def remove_checkpoint(self) -> None:
        """Removes the checkpoint, if there is one: the trial has ended."""
        if self.file is not None:
            self.file.remove()

    @property
    def given_up(self) -> str | None:
        """Why the trial is not tried again; None if it is."""
        if self.number <= MAX_ATTEMPTS:
            return None
        sizes = (
            f" with microbatch_size={self.killed_microbatch}" if self.killed_microbatch else "",
            f" evaluating in pieces of {self.killed_evaluation}" if self.killed_evaluation else "",
        )
        killed = f"memory: killed in each of {MAX_ATTEMPTS} attempts, last by {self.killed_by}"
        return killed + " and".join(filter(None, sizes))

    def most(self, microbatch_size: int) -> int:
        """Most samples that a microbatch may hold: at most half of what one was killed with."""
        if self.killed_microbatch is None:
            return microbatch_size
        return max(1, min(microbatch_size, self.killed_microbatch // 2))

    def most_evaluated(self, piece: int | None) -> int | None:
        """Most samples that a piece of an evaluation may hold: at most half of what was killed.

        Args:
            piece: What it would be if nothing had been killed.
        """
        killed = self.killed_evaluation
        return piece if killed is None else max(1, min(piece or killed, killed // 2))

    def failed_sizes(self, *, fits: int) -> list[int]:
        """What the death says of memory, once a smaller microbatch has fitted: that it ran out."""
        killed = self.killed_microbatch
        return [killed] if killed is not None and 0 < fits < killed else []

    def started(self, *, microbatch_size: int) -> dict[str, int | str]:
        """What to store with the trial before it trains, so that its death can be understood."""
        if self.folder is None:
            return {}
        return {
            attributes.FIRST_ATTEMPT: self.first,
            attributes.ATTEMPT: self.number,
            attributes.CHECKPOINT: self.checkpoint,
            attributes.MICROBATCH_SIZE: microbatch_size,
        }

    def evaluating(self, piece: int) -> dict[str, int]:
        """What to store with the trial at the begin of an evaluation, and with 0 at its end."""
        return {} if self.folder is None else {attributes.EVALUATION_TRIED: piece}


def inherited(stored: Mapping[str, Any]) -> dict[str, Any]:
    """What a trial that is queued again as it was takes over from its user attributes."""
    return {key: stored[key] for key in _INHERITED if key in stored}


def after_death(number: int, stored: Mapping[str, Any], *, signal: str) -> dict[str, Any]:
    """User attributes of the attempt after one whose worker has died.

    Args:
        number: Number of the trial that it was in.
        stored: The user attributes of that trial.
        signal: Name of the signal that killed the worker.
    """
    found = {
        **inherited(stored),
        attributes.FIRST_ATTEMPT: stored.get(attributes.FIRST_ATTEMPT, number),
        attributes.ATTEMPT: stored.get(attributes.ATTEMPT, 1) + 1,
        attributes.KILLED_BY: signal,
    }
    if stored.get(attributes.EVALUATION_TRIED):  # then no microbatch is to blame
        found[attributes.KILLED_EVALUATION] = stored[attributes.EVALUATION_TRIED]
    elif attributes.MICROBATCH_SIZE in stored:
        found[attributes.KILLED_MICROBATCH] = stored[attributes.MICROBATCH_SIZE]
    else:
        found[attributes.KILLED_EARLY] = True
    if attributes.CHECKPOINT in stored:
        found[attributes.CHECKPOINT] = stored[attributes.CHECKPOINT]
    return found

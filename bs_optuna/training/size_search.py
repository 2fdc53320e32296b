"""SizeSearch: which microbatch size a trial tries next, beside others that search too."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping

from bs_optuna.sampling import attributes
from bs_optuna.science.memory import beside
from bs_optuna.science.memory import close
from bs_optuna.science.memory import lowered
from bs_optuna.training.known_sizes import Claim
from bs_optuna.training.known_sizes import KnownSizes
from bs_optuna.training.known_sizes import learned
from bs_optuna.training.search import Seen


class SizeSearch:
    """Claims each size before it is tried, in the study, and keeps clear of what others claim.

    Nobody waits. A claim is written first and then the others' are read, so that of two workers
    that want the same size at least one sees the other and takes less. A claim ends when its size
    is known to fit or to fail, and with its trial; one that is still there when a worker has done
    a whole trial since is taken to be that of a dead worker.

    Nothing is written or read where the next size is known to fit.

    Args:
        trial: Number of the trial.
        batch_size: Samples per optimizer step.
        memory_key: Of its task and device.
        look: Reads what all trials say by now.
        tell: Stores attributes with this trial.
        old: Claims that do not count.

    Attributes:
        claimed: The last size that was claimed; None if none was.
        seen: Claims of others that have been kept clear of.
    """

    def __init__(
        self,
        trial: int,
        *,
        batch_size: int,
        memory_key: str,
        look: Callable[[], KnownSizes],
        tell: Callable[[Mapping[str, object]], None],
        old: frozenset[Claim] = frozenset(),
    ) -> None:
        self.claimed: int | None = None
        self.seen: set[Claim] = set()
        self._trial = trial
        self._batch_size = batch_size
        self._memory_key = memory_key
        self._look = look
        self._tell = tell
        self._old = old
        self._fits = 0

    def begin(self, size: int, known: KnownSizes) -> int:
        """The size to begin with.

        Args:
            size: The one to begin with if nobody else were there.
            known: What all trials say by now.
        """
        return self._claim(size, known)

    def smaller(self, failed: int, size: int) -> int:
        """The size to go on with.

        Args:
            failed: The one that has just run out of memory.
            size: The one to go on with if nobody else were there.
        """
        if size <= self._fits:
            return size
        self._store({attributes.MICROBATCH_FAILS: failed})
        return self._claim(size, self._look())

    def learned(self, run: Seen) -> None:
        """Stores what a run has learned so far; others begin while it trains, maybe for hours."""
        if run.failed_sizes or self.claimed is not None:
            self._tell(learned(run, self._memory_key))

    def _claim(self, size: int, known: KnownSizes) -> int:
        size = self._free(size, known)
        while size > self._fits:
            self._store({attributes.MICROBATCH_TRIED: size})
            self.claimed = size
            known = self._look()
            free = self._free(size, known)
            if free == size:
                break
            # Both have written before they read. Each goes as far down as its rank says, so that
            # they do not meet again.
            rank = sum(c.trial < self._trial and close(size, c.size) for c in self._others(known))
            size = lowered(free, free >> rank, batch_size=self._batch_size)
        return size

    def _free(self, size: int, known: KnownSizes) -> int:
        self._fits = known.microbatch.fits
        size = min(size, known.microbatch.start(self._batch_size))
        others = self._others(known)
        self.seen.update(others)
        claims = [claim.size for claim in others]
        return beside(size, claims, batch_size=self._batch_size, fits=self._fits)

    def _others(self, known: KnownSizes) -> list[Claim]:
        return [c for c in known.claims if c.trial != self._trial and c not in self._old]

    def _store(self, found: Mapping[str, object]) -> None:
        if self.claimed is None:
            self._tell({attributes.MEMORY_KEY: self._memory_key})
        self._tell(found)

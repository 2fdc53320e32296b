"""StudyMemory: what a study knows of memory, as the trials of one process see it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping

import optuna

from bs_optuna.training.known_sizes import Claim
from bs_optuna.training.known_sizes import KnownSizes
from bs_optuna.training.known_sizes import known_sizes
from bs_optuna.training.size_search import SizeSearch
from bs_optuna.training.starting_sizes import StartingSizes


class StudyMemory:
    """Reads what trials have stored of memory, and predicts where they have not.

    Args:
        key: Of task, device and limit; see `memory_key`.
        starting_sizes: Predicts and measures.

    Attributes:
        key: As given.
    """

    def __init__(self, key: str, starting_sizes: StartingSizes) -> None:
        self.key = key
        self._starting_sizes = starting_sizes
        self._old_claims: set[Claim] = set()  # that a trial of this process has met

    def stored(self, study: optuna.Study, batch_size: int) -> KnownSizes:
        """What trials have stored of what fits beside a batch of a size."""
        trials = study.get_trials(deepcopy=False)
        predicted = self._starting_sizes.predicted(batch_size).microbatch is not None
        return known_sizes(trials, self.key, batch_size=batch_size, predicted=predicted)

    def known(self, study: optuna.Study, batch_size: int, *, measure: bool = False) -> KnownSizes:
        """Likewise, once it has been predicted what fits.

        Not where that is known to be nothing, or after a death that the prediction may have caused.

        Args:
            study: Of the trials.
            batch_size: Samples per optimizer step.
            measure: Whether real steps may be taken for the prediction.
        """
        known = self.stored(study, batch_size)
        if known.microbatch.sample_fails or known.early_deaths:
            return known
        if self._starting_sizes.predict(batch_size, known, measure=measure):
            known = self.stored(study, batch_size)  # by others in the meantime
        return known

    def search(
        self,
        trial: optuna.Trial,
        batch_size: int,
        *,
        tell: Callable[[Mapping[str, object]], None],
    ) -> SizeSearch:
        """The search for a size of a trial, which heeds what others are trying."""
        return SizeSearch(
            trial.number,
            batch_size=batch_size,
            memory_key=self.key,
            look=lambda: self.known(trial.study, batch_size),
            tell=tell,
            old=frozenset(self._old_claims),
        )

    def ended(self, search: SizeSearch) -> None:
        """Claims that the search of a trial has met are not heeded by the next one."""
        self._old_claims |= search.seen

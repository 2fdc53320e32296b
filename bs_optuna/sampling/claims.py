"""No two processes get the same point: the study tells what each was given a moment ago."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.study import Study

from bs_optuna.sampling import attributes


Params = Mapping[str, Any]

# How often a process that was given the same as another looks for something else. Of four that are
# at it at once, at random speeds, two ended with the same in 3 of 300 runs with 4 rounds, in none
# with 8.
_ROUNDS = 8


class Claims:
    """The suggestions of one process for trials that run, in an entry of its own.

    Of two processes that are given the same at the same time at least one sees it, as each claims
    what it was given before it looks at what the others have claimed. A study that keeps no
    attributes, as the brackets of Hyperband, only shows what is stored.
    """

    def __init__(self) -> None:
        self._sampler = uuid.uuid4().hex[:8]

    def settled(
        self,
        study: Study,
        given: Mapping[int, Params],
        number: int,
        space: Mapping[str, BaseDistribution],
        seen: Collection[int],
        again: Callable[[Sequence[Params]], dict[str, Any]],
    ) -> dict[str, Any]:
        """What a trial was given or, where another process has the same, something else.

        Args:
            study: Of all processes.
            given: What this process was given, by trial number.
            number: Of the trial.
            space: Its parameters.
            seen: Numbers of the trials that had ended when it was given them.
            again: Suggests something for it beside what is taken.
        """
        params = dict(given[number])
        taken: list[Params] = []
        for attempt in range(_ROUNDS):
            others = self._of_others(study, {**given, number: params}, space, seen)
            same = [n for n, theirs in others.items() if theirs == params]
            if not same:
                break
            taken += [params, *others.values()]
            if attempt > 0:  # somebody looks at the same time, and finds the same
                for _ in [n for n in same if n < number]:
                    taken.append(again(taken))
            params = again(taken)
            if params in taken:  # nothing else is left
                break
        return params

    def _of_others(
        self,
        study: Study,
        given: Mapping[int, Params],
        space: Mapping[str, BaseDistribution],
        seen: Collection[int],
    ) -> dict[int, dict[str, Any]]:
        """What other processes were given for trials that are not seen, after telling them."""
        claimed: dict[int, dict[str, Any]] = {}
        if hasattr(study, "set_user_attr"):
            # As numbers: a choice may be what JSON has no word for.
            mine = {
                str(number): {n: d.to_internal_repr(params[n]) for n, d in space.items()}
                for number, params in given.items()
                if space.keys() <= params.keys()
            }
            study.set_user_attr(self._key(), mine)
            claimed = {
                number: {n: d.to_external_repr(values[n]) for n, d in space.items()}
                for number, values in self._entries(study)
                if space.keys() == values.keys()
            }
        # Last: what is not claimed any more is stored.
        trials = study.get_trials(deepcopy=False)
        new = {t.number: t.params for t in trials if t.number not in {*given, *seen}}
        stored = {
            number: {n: params[n] for n in space}
            for number, params in new.items()
            if space.keys() <= params.keys()
        }
        return {n: params for n, params in {**claimed, **stored}.items() if n in new}

    def _entries(self, study: Study) -> Iterator[tuple[int, Mapping[str, float]]]:
        for key, claims in study.user_attrs.items():
            ours = key.startswith(attributes.SUGGESTED) and key != self._key()
            if ours and isinstance(claims, dict):
                for number, values in claims.items():
                    if number.isdecimal() and isinstance(values, dict):
                        yield int(number), values

    def _key(self) -> str:
        # A process that was forked has the same sampler.
        return f"{attributes.SUGGESTED}{self._sampler}_{os.getpid()}"

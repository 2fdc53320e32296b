"""What CoupledSampler says, once, where it cannot use what it was told."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from collections.abc import Sequence

from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from bs_optuna.sampling import history
from bs_optuna.sampling.space import Names
from bs_optuna.sampling.space import Space


_logger = logging.getLogger(__name__)


class Notices:
    """Each of them is logged as a warning the first time that there is a reason."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def apart(self, param_name: str) -> None:
        """A parameter is left to TPE; the only notice of that, whatever others there are."""
        self._once(
            "apart",
            f"Parameter {param_name!r} is not in every trial, or not on the same scale, so TPE "
            "suggests it, and others like it, apart from the model. Have it in all trials, or "
            "begin a new study, to have it modelled.",
        )

    def no_ridge(self, space: Space, names: Names, trials: Sequence[FrozenTrial]) -> None:
        """There is none by mistake: names that no trial has, or values that are no numbers.

        One that is fixed, or has other ranges in other trials, is known under its name.
        """
        axes = {axis.name for axis in space.axes}
        told = [t for t in trials if t.state in history.TOLD]
        if space.ridge is not None or len(axes) < 2 or not told:
            return
        two = (names.batch_size, names.learning_rate)
        apart = [name for name in two if name not in axes]
        if apart and all(any(name in t.params for t in told) for name in apart):
            return
        self._once(
            "no ridge",
            f"The parameters of all trials are {', '.join(sorted(axes))}; without a batch size "
            f"{two[0]!r} and a learning rate {two[1]!r} that are positive numbers, nothing is "
            "coupled and no reference used. Name them: "
            "CoupledSampler(batch_size=..., learning_rate=...).",
        )

    def no_costs(
        self, attribute: str | None, costs: Mapping[int, float], trials: Sequence[FrozenTrial]
    ) -> None:
        """No completed trial has the attribute that was named."""
        completed = any(t.state == TrialState.COMPLETE for t in trials)
        if attribute is not None and completed and not costs:
            self._once(
                "no costs",
                f"No trial has a positive number as its user attribute {attribute!r}, so cost is "
                f"left out; store it: trial.set_user_attr({attribute!r}, ...).",
            )

    def _once(self, about: str, message: str) -> None:
        if about not in self._given:
            self._given.add(about)
            _logger.warning("%s", message)

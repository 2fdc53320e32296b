"""CoupledSampler: knows how the best learning rate moves with the batch size."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from bs_optuna.errors import ConfigError
from bs_optuna.sampling import history
from bs_optuna.sampling.acquisition import suggest
from bs_optuna.sampling.blas import one_thread
from bs_optuna.sampling.cost import measured
from bs_optuna.sampling.fit import QUICK
from bs_optuna.sampling.fit import Fit
from bs_optuna.sampling.space import Names
from bs_optuna.sampling.space import Space
from bs_optuna.sampling.start import start_point
from bs_optuna.science.prior import ScalingPrior


Array = NDArray[np.float64]

_logger = logging.getLogger(__name__)

# Three trials along the ridge come before the model has a say.
_START_TRIALS = 3
# How trials end that had all of their parameters, as a rule.
_TOLD = (TrialState.COMPLETE, TrialState.PRUNED)
_ANY_LEARNING_RATE = FloatDistribution(1e-12, 1e6, log=True)


class CoupledSampler(BaseSampler):
    """Suggest batch size and learning rate together, and every other parameter with them.

    Args:
        prior: The optimizer's name ("sgd", "adamw", "lamb", ...) or a belief of one's own.
        batch_size: Name of the batch size in the objective.
        learning_rate: Name of the learning rate in the objective.
        momentum: Name of the momentum, where the objective tunes it, or with "one_minus_" before it
            that of 1 - momentum. With SGD, RMSprop and LARS the best learning rate is taken to be
            proportional to 1 - momentum.
        weight_decay: Name of the weight decay, where the objective tunes it on a logarithmic scale.
            Its best value is taken to be proportional to the batch size and inversely to the
            learning rate (to lr / (1 - momentum), if the two go together).
        reference: A batch size and a learning rate known to work; the first trial, if they are in
            range. Where momentum is tuned, the learning rate is that for a momentum of 0.9.
        cost: User attribute that holds what a trial cost, such as "seconds" (which falls back to
            the trial's duration). Expected improvement is then divided by the expected cost to a
            power that falls from 1 towards 0 with the number of trials: cheap settings first, the
            best one in the end. None counts every trial as equally expensive.
        seed: Makes suggestions repeatable.

    Raises:
        ConfigError: The optimizer is unknown, or the reference is not positive.
    """

    def __init__(
        self,
        *,
        prior: str | ScalingPrior = "unknown",
        batch_size: str = "batch_size",
        learning_rate: str = "lr",
        momentum: str = "momentum",
        weight_decay: str = "weight_decay",
        reference: tuple[float, float] | None = None,
        cost: str | None = None,
        seed: int | None = None,
    ) -> None:
        if batch_size == learning_rate:
            raise ConfigError(
                f"batch_size and learning_rate are both named {batch_size!r}; name two parameters."
            )
        belief = prior if isinstance(prior, ScalingPrior) else ScalingPrior.for_optimizer(prior)
        self._prior = belief if reference is None else belief.with_reference(*reference)
        self._names = Names(
            batch_size=batch_size,
            learning_rate=learning_rate,
            momentum=momentum,
            weight_decay=weight_decay,
        )
        self._cost = cost
        self._entropy = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self._walkers: Array | None = None
        self._given: dict[tuple[str, int], dict[str, Any]] = {}
        self._read: tuple[Study, int, list[FrozenTrial]] | None = None
        self._warned: set[str] = set()

    @property
    def prior(self) -> ScalingPrior:
        """The belief about the ridge that the sampler starts from."""
        return self._prior

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The parameters that all finished trials share."""
        trials = study.get_trials(deepcopy=False)
        self._read = (study, trial.number, trials)
        return history.shared_space(self._whole(trials))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Suggest all shared parameters at once."""
        if not search_space:
            self._read = None
            return {}
        with one_thread():  # and one suggestion after the other: each knows the ones before
            trials = self._trials(study, trial)
            params = self._suggested(study, trial, search_space, trials)
            if any(t.state == TrialState.RUNNING and t.number != trial.number for t in trials):
                # Another process may have been given the same meanwhile.
                trials = study.get_trials(deepcopy=False)
                if any(t.params == params for t in trials):
                    params = self._suggested(study, trial, search_space, trials)
            self._given[study.study_name, trial.number] = params
        return params

    def _suggested(
        self,
        study: Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
        trials: Sequence[FrozenTrial],
    ) -> dict[str, Any]:
        trials = [t for t in trials if t.number != trial.number]
        space = self._space(search_space)
        self._warn_of_no_ridge(space, trials)
        rng = self._rng(trial)
        fixed = space.fixed(_known(trial))
        seen = history.read(trials, study.directions, search_space)
        under_way = self._under_way(study.study_name, trials, set(search_space))
        seen = replace(seen, running=[*seen.running, *under_way])
        prior = history.informed(self._prior, trials)
        if len(seen) < _START_TRIALS:
            taken = space.coordinates([*seen.params, *seen.running])
            index = self._place(trial, trials)
            return space.params(start_point(space, prior, index, rng, fixed, taken))
        costs = {} if self._cost is None else measured(trials, self._cost)
        self._warn_of_no_costs(costs, trials)
        fit = Fit(space, prior, seen, rng, effort=QUICK, walkers=self._walkers)
        self._walkers = fit.walkers
        return space.params(suggest(fit, rng, fixed, costs))

    def _under_way(
        self, study_name: str, trials: Sequence[FrozenTrial], names: set[str]
    ) -> list[dict[str, Any]]:
        """What other threads were given a moment ago and have not stored yet."""
        stored = {t.number for t in trials if t.state.is_finished() or names <= set(t.params)}
        for key in [k for k in self._given if k[0] == study_name and k[1] in stored]:
            del self._given[key]
        given = (params for (study, _), params in self._given.items() if study == study_name)
        return [params for params in given if names <= set(params)]

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Suggest one parameter that the shared model cannot: at the start, or conditional."""
        rng = self._rng(trial, param_name)
        trials = study.get_trials(deepcopy=False)
        told = [t for t in trials if t.state in _TOLD and t.params]
        if any(t.distributions.get(param_name) != param_distribution for t in told):
            self._warn_once(
                f"Parameter {param_name!r} is not in every trial with the same range, so it is "
                "sampled apart from the model; give it one range in all trials to have it modelled."
            )
            alone = self._space({param_name: param_distribution})
            return alone.params(alone.uniform(rng, 1)[0])[param_name]
        space = self._space({**self._company(trial, param_name), param_name: param_distribution})
        fixed = space.fixed(_known(trial))
        names = {axis.name for axis in space.axes}
        others = [t.params for t in trials if t.number != trial.number and names <= set(t.params)]
        taken = space.coordinates(others)
        index = self._place(trial, trials)
        point = start_point(space, self._prior, index, rng, fixed, taken)
        return space.params(point)[param_name]

    def _trials(self, study: Study, trial: FrozenTrial) -> list[FrozenTrial]:
        """Those that the search space was inferred from, a moment ago; reading takes long."""
        read, self._read = self._read, None
        if read is not None and read[0] is study and read[1] == trial.number:
            return read[2]
        return study.get_trials(deepcopy=False)

    def _place(self, trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> int:
        """How many trials come before it; running ones get their parameters yet."""
        return sum(t.number < trial.number for t in self._whole(trials))

    def _whole(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """All but those that broke off before they had batch size and learning rate.

        If the study has both, that is: the trials that told tell. Where there are none yet, a
        single failure without one of the two has broken off, but a second one says otherwise.
        """
        trials = [t for t in trials if t.params or not t.state.is_finished()]
        told = [t.params for t in trials if t.state in _TOLD]
        names = {self._names.batch_size, self._names.learning_rate}.intersection(*told)
        whole = [t for t in trials if t.state != TrialState.FAIL or names <= t.params.keys()]
        return whole if told or len(trials) - len(whole) < 2 else trials

    def _company(self, trial: FrozenTrial, name: str) -> dict[str, BaseDistribution]:
        """What a parameter suggested alone has to fit: batch size and momentum for lr, and so on.

        If the learning rate comes first, its batch size is the reference's, unless it was enqueued,
        and so may be a momentum; a batch size that comes first walks along the ridge wherever that
        may lie.
        """
        names = self._names
        coupled = (names.batch_size, names.learning_rate, names.momentum, names.one_minus_momentum)
        company = {n: d for n, d in trial.distributions.items() if n in coupled and n != name}
        if name == names.learning_rate and names.batch_size not in company:
            sizes = [self._prior.reference_batch_size, _known(trial).get(names.batch_size)]
            numbers = [round(b) for b in sizes if isinstance(b, int | float) and b >= 1] or [1]
            company[names.batch_size] = IntDistribution(min(numbers), max(numbers), log=True)
        for momentum in (names.momentum, names.one_minus_momentum):
            value = _known(trial).get(momentum)
            if name == names.learning_rate and isinstance(value, int | float):
                company.setdefault(momentum, FloatDistribution(value, value))
        if name == names.batch_size and names.learning_rate not in company:
            company[names.learning_rate] = _ANY_LEARNING_RATE
        return company

    def _warn_of_no_ridge(self, space: Space, trials: Sequence[FrozenTrial]) -> None:
        """Where there is none by mistake: names that no trial has, or values that are no numbers.

        One that is fixed, or has other ranges in other trials, is known under its name.
        """
        axes = {axis.name for axis in space.axes}
        told = [t for t in trials if t.state in _TOLD]
        if space.ridge is not None or len(axes) < 2 or not told:
            return
        names = (self._names.batch_size, self._names.learning_rate)
        apart = [name for name in names if name not in axes]
        if apart and all(any(name in t.params for t in told) for name in apart):
            return
        self._warn_once(
            f"The parameters of all trials are {', '.join(sorted(axes))}; without a batch size "
            f"{names[0]!r} and a learning rate {names[1]!r} that are positive numbers, nothing is "
            "coupled and no reference used. Name them: "
            "CoupledSampler(batch_size=..., learning_rate=...)."
        )

    def _warn_of_no_costs(self, costs: Mapping[int, float], trials: Sequence[FrozenTrial]) -> None:
        completed = any(t.state == TrialState.COMPLETE for t in trials)
        if self._cost is not None and completed and not costs:
            self._warn_once(
                f"No trial has a positive number as its user attribute {self._cost!r}, so cost is "
                f"left out; store it: trial.set_user_attr({self._cost!r}, ...)."
            )

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            _logger.warning("%s", message)

    def _space(self, search_space: Mapping[str, BaseDistribution]) -> Space:
        return Space(search_space, self._names)

    def _rng(self, trial: FrozenTrial, name: str = "") -> np.random.Generator:
        """Random numbers of one trial: the same in every thread and process that has the seed."""
        return np.random.default_rng([self._entropy, trial.number, zlib.crc32(name.encode())])


def _known(trial: FrozenTrial) -> dict[str, Any]:
    """Values that this trial has already, enqueued or suggested: no sampler can change them."""
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}

"""CoupledSampler: knows how the best learning rate moves with the batch size."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from bs_optuna.errors import ConfigError
from bs_optuna.sampling import history
from bs_optuna.sampling.acquisition import suggest
from bs_optuna.sampling.blas import one_thread
from bs_optuna.sampling.claims import Claims
from bs_optuna.sampling.cliff import failed_above
from bs_optuna.sampling.cost import measured
from bs_optuna.sampling.fit import QUICK
from bs_optuna.sampling.fit import Fit
from bs_optuna.sampling.notices import Notices
from bs_optuna.sampling.space import Names
from bs_optuna.sampling.space import Space
from bs_optuna.sampling.start import start_point
from bs_optuna.science.prior import ScalingPrior


Array = NDArray[np.float64]

# Three trials along the ridge come before the model has a say.
_START_TRIALS = 3
_ANY_LEARNING_RATE = FloatDistribution(1e-12, 1e6, log=True)


class CoupledSampler(BaseSampler):
    """Suggest batch size and learning rate together, and every other parameter with them.

    Args:
        prior: The optimizer's name ("sgd", "adamw", "lamb", ...) or a belief of one's own.
        batch_size: Name of the batch size in the objective.
        learning_rate: Name of the learning rate in the objective.
        momentum: Name of the momentum, where the objective tunes it; a parameter of that name with
            "one_minus_" before it is taken for 1 - momentum. With SGD, RMSprop and LARS the best
            learning rate is taken to be proportional to 1 - momentum.
        weight_decay: Name of the weight decay, where the objective tunes it on a logarithmic scale.
            Its best value is taken to be proportional to the batch size and inversely to the
            learning rate (to lr / (1 - momentum), if the two go together).
        reference: A batch size and a learning rate known to work; the first trial, if they are in
            range. Where momentum is tuned, the learning rate is that for a momentum of 0.9.
        cost: User attribute that holds what a completed trial cost, such as "seconds" (which falls
            back to the trial's duration). Expected improvement is then divided by the expected cost
            to a power that falls from 1 towards 0 with the number of trials: cheap settings first,
            the best one in the end. None counts every trial as equally expensive.
        seed: Makes the suggestions of a new sampler repeatable, for one trial at a time: those for
            trials that run at once depend on which of them ends first, and a sampler that has
            worked before begins with what it has found.

    Raises:
        ConfigError: The optimizer is unknown, the reference is no pair of positive numbers, or two
            parameters have the same name.
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
        named = [batch_size, learning_rate, momentum, weight_decay]
        if twice := [name for name in named if named.count(name) > 1]:
            raise ConfigError(
                f"{twice[0]!r} stands for two of batch_size, learning_rate, momentum and "
                "weight_decay; name different parameters."
            )
        belief = prior if isinstance(prior, ScalingPrior) else ScalingPrior.for_optimizer(prior)
        self._prior = belief if reference is None else belief.with_reference(*_pair(reference))
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
        self._notices = Notices()
        self._claims = Claims()

    def __getstate__(self) -> dict[str, Any]:
        # Other threads write to what was given; elsewhere none of these trials is under way.
        return {**self.__dict__, "_given": {}, "_read": None, "_claims": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._claims = Claims()  # two that are read from one pickle are two workers

    @property
    def prior(self) -> ScalingPrior:
        """The belief about the ridge that the sampler starts from."""
        return self._prior

    @property
    def names(self) -> Names:
        """What it takes for batch size, learning rate, momentum and weight decay."""
        return self._names

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The parameters that all finished trials share, with their newest ranges."""
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
            if self._space(search_space).may_recur(params):

                def again(taken: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
                    now = study.get_trials(deepcopy=False)
                    return self._suggested(study, trial, search_space, now, taken)

                given = {**self._given_in(study.study_name), trial.number: params}
                seen = {t.number for t in trials if t.state.is_finished()}
                params = self._claims.settled(study, given, trial.number, search_space, seen, again)
            self._given[study.study_name, trial.number] = params
        return params

    def _suggested(
        self,
        study: Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
        trials: Sequence[FrozenTrial],
        taken: Sequence[Mapping[str, Any]] = (),
    ) -> dict[str, Any]:
        """What the model suggests, and before that the start, beside what others were given."""
        trials = [t for t in trials if t.number != trial.number]
        space = self._space(search_space)
        self._notices.no_ridge(space, self._names, trials)
        rng = self._rng(trial)
        fixed = space.fixed(_known(trial))
        told = history.telling(trials, search_space)
        seen = history.read(told, study.directions, failed_above(told, space))
        under_way = self._under_way(study.study_name, trials, set(search_space), trial.number)
        seen = replace(seen, running=[*seen.running, *under_way, *taken])
        prior = history.informed(self._prior, trials)
        if len(seen) < _START_TRIALS:
            known = space.coordinates([*seen.params, *seen.running])
            index = self._place(trial, trials)
            return space.params(start_point(space, prior, index, rng, fixed, known))
        costs = {} if self._cost is None else measured(trials, self._cost)
        self._notices.no_costs(self._cost, costs, trials)
        fit = Fit(space, prior, seen, rng, effort=QUICK, walkers=self._walkers)
        self._walkers = fit.walkers
        return space.params(suggest(fit, rng, fixed, costs))

    def _under_way(
        self, study_name: str, trials: Sequence[FrozenTrial], names: set[str], before: int
    ) -> list[dict[str, Any]]:
        """What other threads were given a moment ago and have not stored yet."""
        for t in trials:
            if t.state.is_finished():
                self._given.pop((study_name, t.number), None)
        stored = {t.number for t in trials if names <= set(t.params)}
        # Hyperband shows each of its brackets only the trials of that.
        numbers = {t.number for t in trials}
        known = stored | (set(range(before)) - numbers)
        given = self._given_in(study_name).items()
        return [p for number, p in given if names <= set(p) and number not in known]

    def _given_in(self, study_name: str) -> dict[int, dict[str, Any]]:
        """What this process was given for trials of a study that may still run, by number."""
        return {number: p for (name, number), p in self._given.items() if name == study_name}

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
        shared = history.shared_space(self._whole(trials))
        known = shared.get(param_name)
        if known != param_distribution and history.is_alike(known, param_distribution):
            # What was suggested from the range known so far is out of the new one.
            now = {**shared, param_name: param_distribution}
            with one_thread():
                return self._suggested(study, trial, now, trials)[param_name]
        told = [t for t in trials if t.state in history.TOLD and t.params]
        if any(t.distributions.get(param_name) != param_distribution for t in told):
            self._notices.apart(param_name)
            alone = TPESampler(seed=int(rng.integers(2**31)))
            return alone.sample_independent(study, trial, param_name, param_distribution)
        space = self._space({**self._company(trial, param_name), param_name: param_distribution})
        fixed = space.fixed(_known(trial))
        names = {axis.name for axis in space.axes}
        others = [t for t in self._whole(trials) if t.number != trial.number]
        taken = space.coordinates([t.params for t in others if names <= set(t.params)])
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
        return history.whole(trials, {self._names.batch_size, self._names.learning_rate})

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

    def _space(self, search_space: Mapping[str, BaseDistribution]) -> Space:
        return Space(search_space, self._names)

    def _rng(self, trial: FrozenTrial, name: str = "") -> np.random.Generator:
        """Random numbers of one trial: the same in every thread and process that has the seed."""
        return np.random.default_rng([self._entropy, trial.number, zlib.crc32(name.encode())])


def _known(trial: FrozenTrial) -> dict[str, Any]:
    """Values that this trial has already, enqueued or suggested: no sampler can change them."""
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


def _pair(reference: object) -> tuple[float, float]:
    """A batch size and a learning rate.

    Raises:
        ConfigError: It is something else.
    """
    if isinstance(reference, Sequence) and len(reference) == 2:
        batch_size, learning_rate = reference
        if isinstance(batch_size, Real) and isinstance(learning_rate, Real):
            return float(batch_size), float(learning_rate)
    raise ConfigError(
        f"reference={reference!r}; must be a batch size and a learning rate, as in (64, 1e-3)."
    )

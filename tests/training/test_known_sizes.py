"""What one trial says about memory to those after it, and what it does not say."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field

import optuna
from optuna.distributions import IntDistribution

from bs_optuna.sampling import attributes
from bs_optuna.science.memory import MicrobatchBounds
from bs_optuna.training.known_sizes import KnownSizes
from bs_optuna.training.known_sizes import known_sizes
from bs_optuna.training.known_sizes import learned


KEY = "this task on this device"
SIZES = IntDistribution(16, 1024, log=True)


@dataclass
class Run:
    """A training as `learned` sees it."""

    fits: int
    ran: int
    failed_sizes: list[int] = field(default_factory=list)
    evaluation_fits: int | None = None


def trial(batch_size: int, fits: int, fails: int | None) -> optuna.trial.FrozenTrial:
    stored = {attributes.MEMORY_KEY: KEY, attributes.MICROBATCH_FITS: fits}
    if fails is not None:
        stored[attributes.MICROBATCH_FAILS] = fails
    return optuna.create_trial(
        value=1.0,
        params={"batch_size": batch_size},
        distributions={"batch_size": SIZES},
        user_attrs=stored,
    )


def test_a_batch_that_does_not_fit_by_single_samples_says_so_of_larger_ones_alone() -> None:
    """The batch itself takes memory, and so do the sparse gradients of all its samples."""
    trials = [trial(256, 256, None), trial(512, 0, 1)]
    for batch_size in (512, 1024):
        assert known_sizes(trials, KEY, batch_size=batch_size).microbatch.sample_fails
    for batch_size in (64, 256):
        known = known_sizes(trials, KEY, batch_size=batch_size).microbatch
        assert known == MicrobatchBounds(256, None)
        assert known.start(batch_size) == batch_size


def test_a_batch_stays_open_until_it_has_fitted_or_something_has_failed() -> None:
    known = known_sizes([trial(256, 128, None)], KEY, batch_size=256)
    assert not known.leaves_open(128)
    assert known.leaves_open(129)
    assert not known_sizes([trial(256, 64, 128)], KEY, batch_size=256).leaves_open(256)
    assert known_sizes([], KEY, batch_size=256).leaves_open(1)


def test_where_it_is_predicted_what_fitted_beside_much_smaller_batches_says_nothing() -> None:
    trials = [trial(64, 32, None), trial(128, 24, None), trial(64, 8, 40)]
    for batch_size, fits in ((64, 32), (128, 32), (256, 24), (512, 0)):
        known = known_sizes(trials, KEY, batch_size=batch_size, predicted=True).microbatch
        assert known == MicrobatchBounds(fits, 40)
        known = known_sizes(trials, KEY, batch_size=batch_size).microbatch
        assert known == MicrobatchBounds(32, 40)


def test_a_death_in_any_trial_is_known() -> None:
    stored = {attributes.MEMORY_KEY: KEY, attributes.KILLED_BY: "SIGKILL"}
    died = optuna.create_trial(value=1.0, user_attrs=stored)
    assert known_sizes([trial(256, 64, 128), died], KEY, batch_size=256).deaths
    assert not known_sizes([trial(256, 64, 128)], KEY, batch_size=256).deaths


def test_what_failed_beside_larger_batches_with_more_than_one_sample_counts() -> None:
    known = known_sizes([trial(512, 8, 16)], KEY, batch_size=64).microbatch
    assert known == MicrobatchBounds(8, 16)


def test_a_passing_spike_says_nothing_of_half_of_what_had_run() -> None:
    stored = learned(Run(fits=2, ran=64, failed_sizes=[64, 32, 16, 8, 4]), KEY)
    assert stored[attributes.MICROBATCH_FITS] == 2  # what has run, nothing that was inferred
    assert stored[attributes.MICROBATCH_FAILS] == 64


def test_what_never_ran_has_failed() -> None:
    stored = learned(Run(fits=2, ran=2, failed_sizes=[64, 32, 16, 8, 4]), KEY)
    assert stored[attributes.MICROBATCH_FITS] == 2
    assert stored[attributes.MICROBATCH_FAILS] == 4


def test_after_a_death_what_has_fitted_is_enough() -> None:
    """A failure that is an error may be met again to learn more; one that kills may not."""
    bounds = MicrobatchBounds(fits=170, fails=490)
    assert KnownSizes(bounds, None).start(512, predicted=440) == 440
    assert KnownSizes(bounds, None, deadly=True).start(512, predicted=440) == 170
    assert KnownSizes(bounds, None, deadly=True).start(100, predicted=440) == 100
    assert KnownSizes(MicrobatchBounds(0, 490), None, deadly=True).start(512, predicted=None) == 245


def test_a_death_says_something_under_its_own_key_only() -> None:
    """In a study that several machines share, one of which was turned off, say."""
    killed = {attributes.KILLED_BY: "SIGKILL", attributes.KILLED_MICROBATCH: 490}
    sizes = {attributes.MICROBATCH_FITS: 170, attributes.MICROBATCH_FAILS: 490}
    early = {attributes.KILLED_EARLY: True}

    def known(key: str, stored: dict[str, object]) -> KnownSizes:
        attrs = {attributes.MEMORY_KEY: key, **stored}
        trial = optuna.create_trial(value=0.0, user_attrs=attrs)
        return known_sizes([trial], KEY, batch_size=512)

    assert known(KEY, killed | sizes).deadly
    assert known(KEY, killed | early).early_deaths
    assert known(KEY, killed | sizes | {attributes.MICROBATCH_FAILS: 400}).deaths
    assert not known(KEY, killed | sizes | {attributes.MICROBATCH_FAILS: 400}).deadly
    other = known("of another machine", killed | sizes | early)
    assert [other.deaths, other.deadly, other.early_deaths] == [False] * 3

"""Workers that search for a size at the same time fail as often as one, however they interleave."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from bs_optuna.sampling import attributes
from bs_optuna.science.accumulation import AccumulationPlan
from bs_optuna.science.memory import MicrobatchBounds
from bs_optuna.training.known_sizes import Claim
from bs_optuna.training.known_sizes import KnownSizes
from bs_optuna.training.known_sizes import known_sizes
from bs_optuna.training.size_search import SizeSearch


KEY = "key"


@dataclass
class Run:
    """What a search is told of a run."""

    fits: int = 0
    ran: int = 0
    failed_sizes: list[int] = field(default_factory=list)
    evaluation_fits: int | None = None


class Turns:
    """Threads of which one goes on at a time; who is next is read from a list, then by turns."""

    def __init__(self, order: list[int]) -> None:
        self._order = iter(order)
        self._waiting: dict[int, threading.Semaphore] = {}
        self._control = threading.Semaphore(0)
        self._me = threading.local()
        self._errors: list[BaseException] = []

    def pause(self) -> None:
        """Lets another one go on; what lies between two pauses happens at once."""
        self._control.release()
        self._waiting[self._me.number].acquire()

    def run(self, works: list[Callable[[], None]]) -> None:
        alive = dict(enumerate(works))
        self._waiting = {number: threading.Semaphore(0) for number in alive}
        threads = {n: threading.Thread(target=self._work, args=(n, alive)) for n in list(alive)}
        for thread in threads.values():
            thread.start()
        turn = 0
        while alive:
            turn = next(self._order, turn + 1)
            self._waiting[sorted(alive)[turn % len(alive)]].release()
            self._control.acquire()
        for thread in threads.values():
            thread.join()
        for error in self._errors:
            raise error

    def _work(self, number: int, alive: dict[int, Callable[[], None]]) -> None:
        self._me.number = number
        self._waiting[number].acquire()
        try:
            alive[number]()
        except BaseException as error:
            self._errors.append(error)
        del alive[number]
        self._control.release()


class Worker:
    """A process with a study: trains as `TrainingRun` does, in a memory that holds so much."""

    def __init__(self, study: optuna.Study, turns: Turns | None, capacity: int) -> None:
        self.failed: list[int] = []
        self.ran: list[int] = []
        self._study = study
        self._pause = (lambda: None) if turns is None else turns.pause
        self._capacity = capacity
        self._old: set[Claim] = set()

    def look(self) -> KnownSizes:
        self._pause()
        return known_sizes(self._study.get_trials(deepcopy=False), KEY, batch_size=2**20)

    def trial(self, batch_size: int) -> None:
        trial = self._study.ask()

        def tell(found: Mapping[str, object]) -> None:
            for key, value in found.items():
                self._pause()
                if value is not None:
                    trial.set_user_attr(key, value)

        search = SizeSearch(
            trial.number,
            batch_size=batch_size,
            memory_key=KEY,
            look=self.look,
            tell=tell,
            old=frozenset(self._old),
        )
        known = self.look()
        size = search.begin(known.microbatch.start(batch_size), known)
        plan, run = AccumulationPlan.within(batch_size, size), Run()
        self._pause()
        while plan.microbatch_size > self._capacity:
            run.failed_sizes.append(plan.microbatch_size)
            plan = plan.halved()
            least = search.smaller(run.failed_sizes[-1], plan.microbatch_size)
            assert 1 <= least <= plan.microbatch_size
            plan = AccumulationPlan.within(batch_size, least)
            self._pause()
        run.fits = run.ran = plan.microbatch_size
        search.learned(run)
        self._pause()
        self._study.tell(trial, 0.0)
        self._old |= search.seen
        self.failed += run.failed_sizes
        self.ran.append(run.fits)


def quiet_study() -> optuna.Study:
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))


@settings(max_examples=300)
@given(data=st.data(), largest=st.integers(2, 600), workers=st.integers(2, 4))
def test_all_together_fail_as_often_as_one_whatever_the_order(
    data: st.DataObject, largest: int, workers: int
) -> None:
    capacity = data.draw(st.integers(2, largest))
    sizes = st.lists(st.integers(2, largest), min_size=1, max_size=4)
    batches = [data.draw(sizes) for _ in range(workers)]
    turns = Turns(data.draw(st.lists(st.integers(0, workers - 1), max_size=200)))
    study = quiet_study()
    crew = [Worker(study, turns, capacity) for _ in range(workers)]
    turns.run(
        [
            lambda worker=worker, sizes=sizes: [worker.trial(size) for size in sizes]  # type: ignore[misc]
            for worker, sizes in zip(crew, batches, strict=True)
        ]
    )
    failed = sorted(size for worker in crew for size in worker.failed)
    ran = [size for worker in crew for size in worker.ran]
    # Below 6 a smaller one might leave single samples: rather than so, all try the same.
    shared = {size for size in failed if size < 6}
    counted = len(shared) + sum(size not in shared for size in failed)
    assert counted <= math.log2(max(map(max, batches)) / min(ran)) + 1
    known = known_sizes(study.get_trials(deepcopy=False), KEY, batch_size=2**20)
    assert known.claims == ()
    assert known.microbatch.fits == max(ran)
    assert known.microbatch.fails == min(failed, default=None)


def crowd(*attributes_of_running: dict[str, Any]) -> optuna.Study:
    """A study whose trials all run, and have stored this."""
    study = quiet_study()
    for stored in attributes_of_running:
        trial = study.ask()
        for key, value in {attributes.MEMORY_KEY: KEY, **stored}.items():
            trial.set_user_attr(key, value)
    return study


TRIED, FITS, FAILS = (
    attributes.MICROBATCH_TRIED, attributes.MICROBATCH_FITS, attributes.MICROBATCH_FAILS
)  # fmt: skip


@pytest.mark.parametrize(
    ("stored", "begins"),
    [
        ([], 512),
        ([{TRIED: 512}], 256),
        ([{TRIED: 300}], 150),  # rounded to what an equal cut gives
        ([{TRIED: 256}], 512),
        ([{TRIED: 200}], 512),
        ([{TRIED: 512}, {TRIED: 256}], 128),
        ([{TRIED: 512}, {TRIED: 100}], 256),
        ([{TRIED: 512, FITS: 512}], 512),  # it has fitted
        ([{TRIED: 512, FAILS: 512}], 256),  # it has failed
        ([{TRIED: 512, FAILS: 512}, {TRIED: 256}], 128),
        ([{TRIED: 512}, {FITS: 400}], 256),  # 400 in two equal parts
        ([{TRIED: 512, attributes.MEMORY_KEY: "another"}], 512),
    ],
)
def test_a_search_begins_with_the_largest_size_that_is_close_to_no_claim(
    stored: list[dict[str, Any]], begins: int
) -> None:
    worker = Worker(crowd(*stored), None, 512)
    worker.trial(512)
    assert worker.ran == [AccumulationPlan.within(512, begins).microbatch_size]
    assert worker.failed == []


def test_a_claim_ends_with_its_trial() -> None:
    study = crowd({TRIED: 512})
    study.tell(0, state=optuna.trial.TrialState.FAIL)
    worker = Worker(study, None, 512)
    worker.trial(512)
    assert worker.ran == [512]


def test_a_claim_of_a_worker_that_died_unseen_binds_each_other_one_in_one_trial() -> None:
    study = crowd({TRIED: 512})  # runs forever
    worker = Worker(study, None, 512)
    for batch_size in (300, 512, 400):
        worker.trial(batch_size)
    assert worker.ran == [150, 512, 400]


def test_a_claim_never_leads_down_to_a_single_sample() -> None:
    study = crowd({TRIED: 3}, {TRIED: 2})
    worker = Worker(study, None, 8)
    worker.trial(2)
    assert worker.ran == [2]  # BatchNorm cannot train on one


def test_what_is_known_to_fit_is_neither_claimed_nor_looked_up() -> None:
    def never(*_: object) -> Any:
        raise AssertionError

    search = SizeSearch(1, batch_size=64, memory_key=KEY, look=never, tell=never)
    known = KnownSizes(MicrobatchBounds(fits=32, fails=40), None, (Claim(0, 36),))
    assert search.begin(32, known) == 32
    assert search.smaller(32, 16) == 16
    search.learned(Run(fits=32))
    assert search.claimed is None


def test_two_that_claim_the_same_at_the_same_moment_come_apart_at_once() -> None:
    turns, study = Turns([]), quiet_study()  # each of their moves alternates with the other's
    crew = [Worker(study, turns, 512) for _ in range(2)]
    turns.run([lambda worker=worker: worker.trial(512) for worker in crew])  # type: ignore[misc]
    assert sorted(worker.ran for worker in crew) == [[128], [256]]

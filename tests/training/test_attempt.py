"""What the attempt after a sudden death is told, and when there is none any more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bs_optuna.sampling import attributes
from bs_optuna.training.attempt import MAX_ATTEMPTS
from bs_optuna.training.attempt import Attempt
from bs_optuna.training.attempt import after_death
from bs_optuna.training.attempt import inherited


def test_each_attempt_has_half_the_microbatch_and_the_first_ones_seed_and_file(
    tmp_path: Path,
) -> None:
    stored: dict[str, Any] = {}
    first = Attempt.read(4, stored, folder=tmp_path)
    size = 64
    for number in range(4, 4 + MAX_ATTEMPTS):
        attempt = Attempt.read(number, stored, folder=tmp_path)
        assert attempt.given_up is None
        assert attempt.first == 4
        assert attempt.most(100) == (100 if number == 4 else size)
        if number == 4:
            first = attempt
        assert attempt.checkpoint == first.checkpoint
        size = min(attempt.most(100), 50)
        stored = {**stored, **attempt.started(microbatch_size=size)}
        stored = after_death(number, stored, signal="SIGKILL")
        size //= 2
    last = Attempt.read(9, stored, folder=tmp_path)
    assert last.given_up is not None
    assert last.given_up.startswith("memory: killed in each of 3 attempts, last by SIGKILL")
    assert "microbatch_size=12" in last.given_up


def test_a_single_sample_is_not_halved() -> None:
    stored = {attributes.MICROBATCH_SIZE: 1}
    attempt = Attempt.read(1, after_death(0, stored, signal="SIGABRT"), folder=None)
    assert attempt.most(32) == 1
    assert attempt.failed_sizes(fits=1) == []


def test_a_death_tells_of_memory_only_once_a_smaller_microbatch_has_fitted() -> None:
    stored = after_death(0, {attributes.MICROBATCH_SIZE: 16}, signal="SIGKILL")
    attempt = Attempt.read(1, stored, folder=None)
    assert attempt.failed_sizes(fits=0) == []
    assert attempt.failed_sizes(fits=8) == [16]


def test_a_death_before_the_size_was_known_halves_nothing() -> None:
    attempt = Attempt.read(1, after_death(0, {}, signal="SIGSEGV"), folder=None)
    assert (attempt.number, attempt.killed_by, attempt.most(32)) == (2, "SIGSEGV", 32)


@pytest.mark.parametrize("folder", [None, Path("somewhere")])
def test_without_a_folder_nothing_is_stored_with_the_trial(folder: Path | None) -> None:
    started = Attempt.read(0, {}, folder=folder).started(microbatch_size=8)
    assert bool(started) == (folder is not None)


def test_a_death_in_an_evaluation_leaves_the_microbatch_alone() -> None:
    stored = {attributes.MICROBATCH_SIZE: 16, attributes.EVALUATION_TRIED: 256}
    attempt = Attempt.read(1, after_death(0, stored, signal="SIGKILL"), folder=None)
    assert attempt.most(16) == 16
    assert attempt.failed_sizes(fits=8) == []
    assert attempt.most_evaluated(None) == 128
    assert attempt.most_evaluated(8) == 8


def test_what_killed_in_training_and_in_an_evaluation_are_both_kept() -> None:
    stored = after_death(0, {attributes.MICROBATCH_SIZE: 16}, signal="SIGKILL")
    stored |= {attributes.MICROBATCH_SIZE: 8, attributes.EVALUATION_TRIED: 64}
    stored = after_death(1, stored, signal="SIGKILL")
    attempt = Attempt.read(2, stored, folder=None)
    assert attempt.most(16) == 8
    assert attempt.most_evaluated(None) == 32
    last = Attempt.read(3, after_death(2, stored, signal="SIGKILL"), folder=None)
    assert last.given_up is not None
    assert last.given_up.endswith(
        "last by SIGKILL with microbatch_size=16 and evaluating in pieces of 64"
    )


def test_a_death_before_the_training_is_told_apart_and_stays_known() -> None:
    stored = after_death(0, {}, signal="SIGKILL")
    assert stored[attributes.KILLED_EARLY]
    again = after_death(1, stored | {attributes.MICROBATCH_SIZE: 16}, signal="SIGKILL")
    assert again[attributes.KILLED_EARLY]
    assert Attempt.read(2, again, folder=None).most(16) == 8
    assert attributes.KILLED_EARLY not in after_death(
        0, {attributes.MICROBATCH_SIZE: 16}, signal="SIGKILL"
    )


def test_between_evaluations_a_death_was_in_training() -> None:
    stored = {attributes.MICROBATCH_SIZE: 16, attributes.EVALUATION_TRIED: 0}
    attempt = Attempt.read(1, after_death(0, stored, signal="SIGKILL"), folder=None)
    assert (attempt.most(16), attempt.most_evaluated(64)) == (8, 64)


def test_what_is_queued_again_as_it_was_keeps_its_count_but_no_file() -> None:
    stored = after_death(
        0, {attributes.MICROBATCH_SIZE: 16, attributes.CHECKPOINT: "a.pt"}, signal="SIGKILL"
    )
    assert stored[attributes.CHECKPOINT] == "a.pt"
    kept = inherited({**stored, attributes.SECONDS: 3.0})
    assert kept == {k: v for k, v in stored.items() if k != attributes.CHECKPOINT}

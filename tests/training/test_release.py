"""A failed attempt is let go of: its tensors are dead before the next one begins."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import weakref

import pytest
import torch

from bs_optuna.training.oom import classify
from bs_optuna.training.oom import empty_caches
from bs_optuna.training.oom import release


class Attempt:
    """A step that holds a tensor in two frames when it fails; knows whether it is still alive."""

    def __init__(self) -> None:
        self.tensors: list[weakref.ref[torch.Tensor]] = []

    def fail(self) -> None:
        activation = torch.zeros(1000)
        self.tensors.append(weakref.ref(activation))
        self.fail_deeper()
        del activation

    def fail_deeper(self) -> None:
        activation = torch.zeros(1000)
        self.tensors.append(weakref.ref(activation))
        torch.empty(2**50)

    def fail_wrapped(self) -> None:
        try:
            self.fail()
        except RuntimeError as error:
            message = torch.zeros(1000)
            self.tensors.append(weakref.ref(message))
            raise ValueError("wrapped") from error

    def fail_in_group(self) -> None:
        caught = []
        for attempt in (self.fail, self.fail_wrapped):
            try:
                attempt()
            except Exception as error:
                caught.append(error)
        raise ExceptionGroup("both", caught)

    def alive(self) -> int:
        return sum(tensor() is not None for tensor in self.tensors)


@pytest.mark.parametrize("name", ["fail", "fail_wrapped", "fail_in_group"])
def test_release_frees_what_the_failed_frames_held(name: str) -> None:
    attempt = Attempt()
    failure: Exception | None = None
    try:
        getattr(attempt, name)()
    except Exception as error:
        failure = error

    assert failure is not None
    assert attempt.alive() == len(attempt.tensors) >= 2

    release(failure)

    assert attempt.alive() == 0
    assert classify(failure) is not None  # the verdict is still there to be reported
    assert failure.__traceback__ is None


def test_empty_caches_collects_cycles() -> None:
    holder: list[object] = [torch.zeros(1000)]
    holder.append(holder)
    tensor = weakref.ref(holder[0])
    del holder

    empty_caches()

    assert tensor() is None


@pytest.mark.skipif(sys.platform != "linux", reason="needs a soft limit on the data segment")
def test_real_allocator_failures_are_handled_without_imports_or_memory() -> None:
    """A fresh process fails for real, with no memory left to import anything."""
    program = """
        import resource, sys, weakref
        import torch
        from bs_optuna.training.oom import classify, empty_caches, release

        tensors = []

        def attempt():
            tensor = torch.ones(2**20)
            tensors.append(weakref.ref(tensor))
            return [tensor, torch.ones(2**26)]

        attempt()
        data = [line for line in open("/proc/self/status") if line.startswith("VmData")]
        limit = int(data[0].split()[1]) * 1024 + 16 * 2**20
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        modules = set(sys.modules)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
        for _ in range(3):
            try:
                attempt()
            except Exception as error:
                failure = error
            resource.setrlimit(resource.RLIMIT_DATA, (2**20, hard))  # nothing more at all
            verdict = classify(failure)
            release(failure)
            empty_caches()
            resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
            assert (verdict.kind, verdict.bytes_requested) == ("cpu", 2**28)
            assert verdict.retryable
            assert not any(tensor() is not None for tensor in tensors)
        assert set(sys.modules) == modules, set(sys.modules) - modules
        print("recovered")
    """
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (child.stdout.strip(), child.returncode) == ("recovered", 0), child.stderr

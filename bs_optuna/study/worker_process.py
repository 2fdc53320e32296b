"""A worker process and what its parent holds of it: a pipe, and a way to hear of its end."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess


@dataclass(eq=False)
class WorkerProcess:
    """A worker process, as its parent has it.

    Attributes:
        process: The process.
        pipe: To and from it.
        end: A descriptor that is ready when it has ended, see `_end_of`.
        busy: Whether it was asked for a trial and has not ended it.
        trial: Number of that trial, once there is one.
    """

    process: BaseProcess
    pipe: Connection
    end: int
    busy: bool = False
    trial: int | None = None

    @classmethod
    def start(cls, target: Callable[[Connection], None]) -> WorkerProcess:
        """A new process, which runs the target with its end of the pipe."""
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=target, args=(there,))
        process.start()
        there.close()
        return cls(process, here, _end_of(process))

    def close(self) -> None:
        """Gives back what belongs to a process that has ended."""
        self.pipe.close()
        if self.end != self.process.sentinel:
            os.close(self.end)
        self.process.close()


def _end_of(process: BaseProcess) -> int:
    """A descriptor that is ready when a process has ended.

    Its sentinel is a pipe, which those that it has forked, and left behind, hold open.
    """
    assert process.pid is not None
    if sys.platform == "linux":
        with suppress(OSError):  # a kernel before 5.3
            return os.pidfd_open(process.pid)
    return process.sentinel

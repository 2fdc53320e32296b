"""What this process forks can be ended, and does not wait for threads that only this one has."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading


_masks = threading.local()  # of signals, in the thread that forks


@functools.cache
def end_forks_by_sigterm() -> None:
    """Lets SIGTERM end every process forked from now on, whatever handler this one has.

    A handler of Python's would not run in a fork that is blocked in C code, and a signal that comes
    while the fork begins would be lost: `multiprocessing.Pool` sends one, and then waits.
    """
    os.register_at_fork(before=_hold_back, after_in_parent=_let_through, after_in_child=_begin)


def _hold_back() -> None:
    _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


def _let_through() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


def _begin() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _let_through()
    if "torch" in sys.modules:  # as a DataLoader does; OpenMP would wait for its threads
        sys.modules["torch"].set_num_threads(1)

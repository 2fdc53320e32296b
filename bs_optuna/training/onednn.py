"""oneDNN after a failed allocation: the thread that met it does without it from then on.

A primitive of oneDNN that could not be created, for want of memory, leaves something behind in its
thread: every primitive after it fails, however much memory there is by then.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextlib import contextmanager
from contextlib import nullcontext

import torch

from bs_optuna.training.oom import OutOfMemory


_logger = logging.getLogger(__name__)
_SPOILED = "could not create a primitive"
_thread = threading.local()


def give_up_onednn(verdict: OutOfMemory) -> bool:
    """Whether another try can succeed because it will do without oneDNN.

    Args:
        verdict: Why an attempt in this thread failed.

    Returns:
        True once in each thread, where oneDNN is what failed.
    """
    if _is_spoiled() or not verdict.message.startswith(_SPOILED):
        return False
    _thread.spoiled = True
    _logger.warning("oneDNN ran out of memory and cannot be used in this thread again; now without")
    return True


def working_onednn() -> AbstractContextManager[None]:
    """A context in which oneDNN is off, for the whole process, if this thread cannot use it."""
    return _without_onednn() if _is_spoiled() else nullcontext()


@contextmanager
def _without_onednn() -> Iterator[None]:
    before = torch.backends.mkldnn.set_flags(False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(*before)


def _is_spoiled() -> bool:
    return getattr(_thread, "spoiled", False)

"""One thread for linear algebra on small matrices: more are slower, and disturb the training's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController


# The number of threads is the whole process's: two that change it in turns would leave it at one.
_turn = threading.Lock()


@contextmanager
def one_thread() -> Iterator[None]:
    """A context in which NumPy and SciPy do linear algebra in the calling thread."""
    with _turn, _controller().limit(limits=1, user_api="blas"):
        yield


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()  # looks through all shared libraries, which takes milliseconds

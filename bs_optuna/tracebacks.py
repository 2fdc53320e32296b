"""The traceback of an error of the task's own code, from where that code begins."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path
from types import TracebackType


_NOT_THE_TASK = [
    Path(__file__).parent,
    *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")),
]


def print_traceback(error: BaseException) -> None:
    """Prints it without the frames above the task's first one, which are of no use to its author.

    Where no frame is the task's, all are printed; of a file that cannot be read none, since the
    error names the place.
    """
    own = error.__traceback__
    while own is not None and not _is_the_tasks(own):
        own = own.tb_next
    if own is not None or isinstance(error, SyntaxError):
        error.__traceback__ = own
    traceback.print_exception(error)


def _is_the_tasks(frame: TracebackType) -> bool:
    name = frame.tb_frame.f_code.co_filename
    path = Path(name)
    return not name.startswith("<") and not any(map(path.is_relative_to, _NOT_THE_TASK))

"""Limits on the memory of this process that leave no room for what it has to load."""

from __future__ import annotations

import re
import sys

from bs_optuna.errors import ConfigError


if sys.platform != "win32":
    import resource

_MIB = 2**20
# With less than this PyTorch's libraries cannot be loaded at all; one of them then tries for ever.
_LEAST = {"RLIMIT_AS": 768 * _MIB, "RLIMIT_DATA": 128 * _MIB}
# With more than this it is not the limit that is wrong.
_AMPLE = 2048 * _MIB
_OPTIONS = {"RLIMIT_AS": "-v", "RLIMIT_DATA": "-d"}
_REFUSED = re.compile(
    r"failed to map segment|[Cc]annot allocate memory|without (?:setting an|exception set)"
)


def check_limits() -> None:
    """Refuses limits under which nothing can be loaded, before that is tried.

    Raises:
        ConfigError: `ulimit -v` or `ulimit -d` is less than any run needs.
    """
    for name, limit in _limits().items():
        if limit < _LEAST[name]:
            raise ConfigError(
                f"ulimit {_OPTIONS[name]} is {limit // 1024}, of KiB; PyTorch takes more than "
                f"{_LEAST[name] // 1024}: raise it."
            )


def refused(error: BaseException) -> ConfigError | None:
    """What to tell the user if an error at the start is due to such a limit; else None.

    Args:
        error: Raised while libraries were loaded or a study was opened.
    """
    limits = {name: limit for name, limit in _limits().items() if limit < _AMPLE}
    memory = isinstance(error, MemoryError) or _REFUSED.search(str(error)) is not None
    if not limits or not memory:
        return None
    stated = " and ".join(
        f"ulimit {_OPTIONS[name]} is {limit // 1024}" for name, limit in limits.items()
    )
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ConfigError(f"{stated}, of KiB; too little to begin ({reason}): raise it.")


def _limits() -> dict[str, int]:
    """Bytes, of those that are set."""
    if sys.platform == "win32":
        return {}
    found = {name: resource.getrlimit(getattr(resource, name))[0] for name in _OPTIONS}
    return {name: limit for name, limit in found.items() if limit != resource.RLIM_INFINITY}

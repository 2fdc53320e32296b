"""The device that a setting names, tried once."""

from __future__ import annotations

import torch

from bs_optuna.errors import ConfigError


def device_named(name: str) -> torch.device | None:
    """The device of a setting; None for ``"auto"``.

    Raises:
        ConfigError: It cannot be used.
    """
    if name == "auto":
        return None
    try:
        device = torch.device(name)
    except RuntimeError:  # whose message lists some twenty kinds
        raise ConfigError(
            f"device={name}; there is no such kind of device. Try cuda, mps, cpu or auto."
        ) from None
    try:
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0].rstrip(".")
        raise ConfigError(f"device={name}; it cannot be used: {reason}. Try device=auto.") from None
    return device

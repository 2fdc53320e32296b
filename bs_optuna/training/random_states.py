"""The generators that a training draws from: kept private, read and put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def private_random_state(device: torch.device) -> Iterator[None]:
    """Lets a run seed PyTorch without the rest of the program noticing."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type):
        yield


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's and PyTorch's generators, of the CPU and the device."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.int64(keys)), position, has_gauss, gauss),
        "cpu": torch.get_rng_state(),
    }
    if device.type in ("cuda", "xpu"):
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    elif device.type == "mps":
        states["device"] = torch.mps.get_rng_state()
    return states


def restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Puts every generator to what `random_states` has read."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["cpu"])
    if device.type in ("cuda", "xpu") and "device" in states:
        torch.get_device_module(device).set_rng_state(states["device"], device)
    elif device.type == "mps" and "device" in states:
        torch.mps.set_rng_state(states["device"])


@contextmanager
def kept_random_states(device: torch.device) -> Iterator[None]:
    """A context for what only measures: every generator is afterwards as it was before."""
    states = random_states(device)
    try:
        yield
    finally:
        restore_random_states(states, device)

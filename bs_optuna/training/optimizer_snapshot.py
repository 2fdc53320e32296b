"""What a step changes in an optimizer and its parameters; undone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import optree
import torch

from bs_optuna.training.snapshot import RandomStates


_Copies = list[tuple[list[torch.Tensor], Iterable[torch.Tensor]]]


class OptimizerSnapshot:
    """What a step may change, before it; restored in place.

    Args:
        optimizer: About to step.
        parameters: Those that it will change.
        in_place: Whether parameters and large state need no copy.
        on_host: Whether to keep the copies in the host's memory.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: list[torch.Tensor],
        in_place: bool,
        on_host: bool,
    ) -> None:
        self._optimizer = optimizer
        self._attributes = dict(vars(optimizer))
        self._state = {key: _containers_copied(e) for key, e in optimizer.state.items()}
        self._settings = [_containers_copied(_settings(group)) for group in optimizer.param_groups]
        kept = (*self._state.values(), *self._settings)
        tensors = [x for e in kept for x in optree.tree_leaves(e) if isinstance(x, torch.Tensor)]
        if in_place:
            tensors = [t for t in tensors if t.numel() == 1]
        else:
            tensors += parameters
        copies = [_copy(t, "cpu" if on_host else t.device) for t in tensors]
        self._copies: _Copies = [(tensors, copies)]
        # Nothing is drawn by those that step in place.
        self._random = None if in_place else RandomStates({p.device.type for p in parameters})

    def restore(self) -> None:
        """Puts back what was copied; large tensors that step in place are not."""
        _write_back(self._copies)
        state = self._optimizer.state
        state.clear()
        state.update(self._state)
        for group, settings in zip(self._optimizer.param_groups, self._settings, strict=True):
            parameters = group["params"]
            group.clear()
            group.update({"params": parameters, **settings})
        vars(self._optimizer).clear()
        vars(self._optimizer).update(self._attributes)
        if self._random is not None:
            self._random.restore()


class CounterSnapshot:
    """The step counters: all that is left half done by one that steps in place and has its state.

    Args:
        optimizer: About to step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        counters = defaultdict(list)
        for entry in optimizer.state.values():
            if (step := entry.get("step")) is not None:
                counters[step.device].append(step)
        self._copies: _Copies = [(same, torch.stack(same)) for same in counters.values()]

    def restore(self) -> None:
        """Puts the counters back."""
        _write_back(self._copies)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _copy(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    return tensor.detach().to(device, copy=True)


def _containers_copied(tree: Any) -> Any:
    return optree.tree_map(lambda leaf: leaf, tree)


def _write_back(copies: _Copies) -> None:
    with torch.no_grad():
        for tensors, copied in copies:
            for tensor, copy in zip(tensors, copied, strict=True):
                tensor.copy_(copy)

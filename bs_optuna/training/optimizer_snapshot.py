"""What a step changes in an optimizer and its parameters; undone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import optree
import torch

from bs_optuna.training.snapshot import RandomStates


class OptimizerSnapshot:
    """What a step may change, before it; restored in place.

    Args:
        optimizer: About to step.
        parameters: Those that it will change.
        done: Groups that it will have stepped when it fails, if each is stepped in place, as a
            whole or not at all: parameters and large state then need no copy. None copies all.
        on_host: Whether to keep the copies in the host's memory.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: list[torch.Tensor],
        done: Sequence[Mapping[str, Any]] | None,
        on_host: bool,
    ) -> None:
        in_place = done is not None
        self._optimizer = optimizer
        self._done = done
        self._attributes = dict(vars(optimizer))
        self._state = {key: _kept(e) for key, e in optimizer.state.items()}
        self._settings = [_kept(_settings(group)) for group in optimizer.param_groups]
        kept = (*self._state.values(), *self._settings)
        tensors = [x for e in kept for x in optree.tree_leaves(e) if _is_written_back(x)]
        if in_place:
            tensors = [t for t in tensors if t.numel() == 1]
        else:
            tensors += parameters
        foreign = not type(optimizer).__module__.startswith("torch.")
        # Many published ones add the weight decay to the gradients.
        self._gradients = [(p, _kept(p.grad)) for p in parameters] if foreign else []
        tensors += [gradient for _, gradient in self._gradients if _is_written_back(gradient)]
        plain = type(optimizer).__module__.startswith("torch.optim.")
        wrapped = [] if plain else _optimizers_in(optimizer)
        self._wrapped = [OptimizerSnapshot(o, [], None, on_host) for o in wrapped]
        self._copies = [(t, _copy(t, "cpu" if on_host else t.device)) for t in tensors]
        # Nothing is drawn by those that step in place.
        self._random = None if in_place else RandomStates({p.device.type for p in parameters})

    def restore(self) -> None:
        """Puts back what was copied, unless all has been stepped in place."""
        if self._done is not None and len(self._done) == len(self._optimizer.param_groups):
            return
        for wrapped in self._wrapped:
            wrapped.restore()
        for p, gradient in self._gradients:
            p.grad = gradient
        with torch.no_grad():
            for tensor, copy in self._copies:
                tensor.copy_(copy)
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
        done: Groups that it will have stepped when it fails; their counters stay as they are.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, done: Sequence[Mapping[str, Any]]) -> None:
        counters = defaultdict(list)
        for p, entry in optimizer.state.items():
            if (step := entry.get("step")) is not None:
                counters[step.device].append((p, step))
        self._counters = [
            (same, torch.stack([step for _, step in same])) for same in counters.values()
        ]
        self._done = done

    def restore(self) -> None:
        """Puts back the counters of all parameters that have not been stepped."""
        stepped = {id(p) for group in self._done for p in group["params"]}
        with torch.no_grad():
            for counters, copies in self._counters:
                for (p, step), copy in zip(counters, copies, strict=True):
                    if id(p) not in stepped:
                        step.copy_(copy)


def _optimizers_in(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Those that another one wraps, by themselves or in lists and the like."""
    own = {k: v for k, v in vars(optimizer).items() if k not in ("state", "param_groups")}
    leaves = optree.tree_leaves(own)  # type: ignore[arg-type,var-annotated]
    return [leaf for leaf in leaves if isinstance(leaf, torch.optim.Optimizer)]


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _copy(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    return tensor.detach().to(device, copy=True)


def _is_written_back(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided


def _kept(tree: Any) -> Any:
    """A tree to be put in the place of this one.

    With its tensors, into which copies are written back; but for sparse ones, which are copies,
    because to write into them takes memory.
    """
    return optree.tree_map(
        lambda leaf: leaf.clone() if _is_sparse(leaf) else leaf, tree, none_is_leaf=True
    )


def _is_sparse(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.layout != torch.strided

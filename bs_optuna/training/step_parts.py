"""What of an optimizer a step takes, in which parts, and whether it could stop between them."""

from __future__ import annotations

from collections import defaultdict

import torch

from bs_optuna.training.step_groups import Group


# Fused, these create their state and then change all tensors of a group in one operation that
# allocates nothing: whatever fails, fails before a parameter was touched.
_IN_PLACE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)


def groups_with_gradients(groups: list[Group]) -> list[Group]:
    """The groups of which a step changes anything."""
    return [group for group in groups if any(p.grad is not None for p in group["params"])]


def parameters_with_gradients(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The parameters with a gradient."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def parts_of(optimizer: torch.optim.Optimizer) -> list[list[torch.Tensor]]:
    """The parameters with a gradient, by group, device and type: what one fused call can take."""
    parts = defaultdict(list)
    for number, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if p.grad is not None:
                parts[number, p.device, p.dtype].append(p)
    return list(parts.values())


def has_its_state(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor]) -> bool:
    """Whether a step creates none."""
    if type(optimizer) is torch.optim.SGD and not any(
        g["momentum"] for g in optimizer.param_groups
    ):
        return True
    return all(map(optimizer.state.get, parameters))


def groups_alike(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a fused call can take each group as a whole."""
    groups = (group["params"] for group in optimizer.param_groups)
    return all(len({(p.device, p.dtype) for p in params}) <= 1 for params in groups)


def steps_in_place(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a failure comes before the parameters of a part are touched, once it has state.

    Those that can be captured in a graph are left out: PyTorch may go through all of them before
    the step does.
    """
    return type(optimizer) in _IN_PLACE and all(
        group.get("fused") and not group.get("capturable") for group in optimizer.param_groups
    )


def is_compiled(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step was put through ``torch.compile``, which takes the groups as they are."""
    return hasattr(vars(optimizer).get("step"), "_torchdynamo_orig_callable")

"""Run in a process of its own: the optimizer's state meets a real limit.

Prints as JSON how a trial ended whose state never fits, and how often a step had to be done again
whose state fits once garbage is collected. A wrong bit ends it with an AssertionError.
"""

from __future__ import annotations

import gc
import json
import logging
from typing import Any

import optuna
import torch
from torch import nn

from bs_optuna.sampling import attributes
from bs_optuna.training import Budget
from bs_optuna.training import GuardedStep
from bs_optuna.training import TrainingObjective
from bs_optuna.training import TrainingTask
from bs_optuna.training.memory_limit import memory_limit


MIB = 2**20
WIDTH = 1024  # WIDTH x 2 WIDTH weights are 8 MiB


def layer() -> nn.Linear:
    return nn.Linear(WIDTH, 2 * WIDTH)


def trial_without_room() -> dict[str, Any]:
    """Weights and gradients take 16 MiB, AdamW's state 16 more; there are 26."""
    models: list[nn.Module] = []

    def model() -> nn.Module:
        models.append(layer())
        return models[-1]

    data = (torch.ones(8, WIDTH), torch.zeros(8, 2 * WIDTH))
    task = TrainingTask(
        model=model, train_data=data, valid_data=data, loss=nn.functional.mse_loss,
        optimizer="adamw",
    )  # fmt: skip
    objective = TrainingObjective(
        task, budget=Budget("steps", 2), batch_size=(1, 8), device=torch.device("cpu"),
        memory_limit=26 * MIB, seed=3,
    )  # fmt: skip
    study = optuna.create_study()
    study.optimize(objective, n_trials=1)
    torch.manual_seed(3)
    fresh = layer().state_dict()
    found = models[-1].state_dict()
    return {
        "state": study.trials[0].state.name,
        "reason": study.trials[0].user_attrs[attributes.PRUNE_REASON],
        "untouched": all(torch.equal(found[name], fresh[name]) for name in fresh),
    }


def steps(optimizer: str, *, garbage: bool, limit: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = layer()
    how = {"fused": optimizer.endswith("fused"), "foreach": False}
    guarded = GuardedStep(made := torch.optim.AdamW(model.parameters(), **how))
    limit.start_trial()
    gc.disable()
    if garbage:
        cycle: list[Any] = [torch.ones(20 * MIB // 4)]
        cycle.append(cycle)
        del cycle
    with limit.active():
        for _ in range(2):
            made.zero_grad()
            model(torch.ones(4, WIDTH)).sum().backward()
            guarded()
    gc.enable()
    moments = [t for entry in made.state.values() for t in entry.values()]
    return [*(p.detach() for p in model.parameters()), *moments]


class Count(logging.Handler):
    failures = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.failures += 1


def collected(optimizer: str, mebibytes: int) -> int:
    """How often the step failed while garbage was in the way."""
    free = memory_limit(torch.device("cpu"), None)
    expected = steps(optimizer, garbage=False, limit=free)
    limit = memory_limit(torch.device("cpu"), mebibytes * MIB)
    limit.warm_up(lambda: steps(optimizer, garbage=False, limit=free))
    logger, count = logging.getLogger("bs_optuna.training.stepping"), Count(logging.INFO)
    logger.setLevel(logging.INFO)
    logger.addHandler(count)
    found = steps(optimizer, garbage=True, limit=limit)
    logger.removeHandler(count)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return count.failures


def main() -> None:
    torch.set_num_threads(1)
    torch.backends.mkldnn.set_flags(False)  # as under a limit, also where there is none
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    result = trial_without_room()
    # Gradients 8, state 16, and, where the step is not in place, copies of 24 and temporaries.
    result["collected"] = {
        "adamw fused": collected("adamw fused", 36), "adamw plain": collected("adamw plain", 72)
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()

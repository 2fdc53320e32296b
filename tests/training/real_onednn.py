"""Run in a process of its own: oneDNN meets a real limit that is lifted before the next try.

Prints as JSON what happened. A wrong bit ends it with an AssertionError.
"""

from __future__ import annotations

import json
import resource
import threading
from contextlib import nullcontext

import torch
from torch import nn

from bs_optuna.training import AccumulatedBackward
from bs_optuna.training import TrainingTask
from bs_optuna.training.evaluation import Evaluation
from bs_optuna.training.process_memory import process_memory


LOSS = nn.functional.cross_entropy
FREE = resource.getrlimit(resource.RLIMIT_DATA)


class Short(nn.Module):
    """Has no memory at all in its first pass, and all there is in the next."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 11, 3), nn.Flatten(), nn.Linear(11 * 49, 3))
        self.passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        if self.passes == 1:
            resource.setrlimit(resource.RLIMIT_DATA, (process_memory("VmData")["VmData"], FREE[1]))
        try:
            outputs: torch.Tensor = self.net(x)
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, FREE)
        return outputs


def still_spoiled(x: torch.Tensor) -> bool:
    try:
        nn.Conv2d(3, 7, 3)(x)
    except RuntimeError as error:
        return str(error).startswith("could not create a primitive")
    return False


def trained(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[int, ...]:
    return AccumulatedBackward(model, LOSS)(*batch).sizes_tried


def in_thread(found: dict[str, object], batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = Short()
    found["sizes_tried"] = trained(model, batch)
    found["passes"] = model.passes
    found["spoiled"] = still_spoiled(batch[0])
    found["enabled"] = torch.backends.mkldnn.enabled
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    found["again"] = trained(model, batch)
    torch.backends.mkldnn.set_flags(False)
    model.zero_grad()
    trained(model, batch)
    torch.backends.mkldnn.set_flags(True)
    for found_, p in zip(grads, model.parameters(), strict=True):
        assert found_ is not None
        assert torch.equal(found_, p.grad)


def evaluated(found: dict[str, object], batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    task = TrainingTask(model=Short, train_data=batch, valid_data=batch, loss=LOSS)
    model = Short()
    evaluation = Evaluation(task, batch_size=len(batch[0]))
    value = evaluation(model, batch, within=nullcontext())["loss"]
    found["evaluation_passes"] = model.passes
    found["evaluation_spoiled"] = still_spoiled(batch[0])
    torch.backends.mkldnn.set_flags(False)
    assert value == evaluation(model, batch, within=nullcontext())["loss"]
    torch.backends.mkldnn.set_flags(True)


def main() -> None:
    torch.set_num_threads(1)
    batch = (torch.randn(5, 3, 9, 9), torch.tensor([0, 1, 2, 0, 1]))
    warm = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(98, 3))
    trained(warm, batch)
    found: dict[str, object] = {}
    for target in (in_thread, evaluated):  # a thread each: what is spoiled is a thread
        thread = threading.Thread(target=target, args=(found, batch))
        thread.start()
        thread.join()
    trained(warm, batch)
    found["main_thread_spoiled"] = still_spoiled(batch[0])
    print(json.dumps(found))


if __name__ == "__main__":
    main()

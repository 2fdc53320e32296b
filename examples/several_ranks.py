"""The same loop on several processes, each with its own part of every batch.

    python -m torch.distributed.run --standalone --nproc-per-node 2 examples/several_ranks.py

Where one of them runs out of memory, all do the step again with a smaller microbatch.
"""

from __future__ import annotations

import gc
import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import DistributedSampler
from torch.utils.data import TensorDataset

from bs_optuna.training import AccumulatedBackward
from bs_optuna.training import GuardedStep


def train(device: torch.device, ranks: dist.ProcessGroup) -> None:
    """Five epochs on the digits."""
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32, device=device) / 16.0
    y = torch.tensor(digits.target, device=device)
    data = TensorDataset(x, y)
    sampler = DistributedSampler(data)
    # The batch over all ranks is 256.
    loader = DataLoader(
        data, batch_size=256 // dist.get_world_size(), sampler=sampler, drop_last=True
    )

    # Not wrapped in DistributedDataParallel. All ranks start with the weights of rank 0.
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    backward = AccumulatedBackward(model, nn.CrossEntropyLoss(), process_group=ranks)
    step = GuardedStep(optimizer, max_norm=1.0, process_group=ranks)

    for epoch in range(5):
        sampler.set_epoch(epoch)
        for inputs, targets in loader:
            optimizer.zero_grad()
            result = backward(inputs, targets)
            step()
        if dist.get_rank() == 0:
            print(
                f"epoch {epoch}: loss {result.loss:.3f}, last batch of {result.batch_size} on "
                f"{dist.get_world_size()} ranks, at most {result.microbatch_size} samples at a time"
            )


if __name__ == "__main__":
    device = torch.device("cpu")
    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    train(device, dist.group.WORLD)
    # What still holds the group when it is destroyed keeps the threads of gloo alive, and these may
    # abort the process while Python shuts down.
    gc.collect()
    dist.destroy_process_group()

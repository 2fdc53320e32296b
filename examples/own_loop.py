"""A training loop of one's own that survives running out of memory; no Optuna in sight.

    python examples/own_loop.py

The optimizer sees the gradient of 256 samples at every step, whatever fits into memory at a time.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import TensorDataset

from bs_optuna.training import AccumulatedBackward


if __name__ == "__main__":
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16.0
    y = torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(x, y), batch_size=256, shuffle=True, drop_last=True)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    # "auto" starts with the whole batch. 100 here, so that there is something to see.
    backward = AccumulatedBackward(model, nn.CrossEntropyLoss(), microbatch_size=100)

    for epoch in range(5):
        for inputs, targets in loader:
            optimizer.zero_grad()
            result = backward(inputs, targets)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        print(
            f"epoch {epoch}: loss {result.loss:.3f}, last batch of {result.batch_size} in "
            f"{result.accumulation_steps} microbatches of at most {result.microbatch_size}"
        )

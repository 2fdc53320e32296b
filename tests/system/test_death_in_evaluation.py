"""A worker that the system kills in an evaluation, whose pieces are smaller from then on."""

from __future__ import annotations

from pathlib import Path

import pytest
from children import run_python
from optuna.trial import TrialState

from bs_optuna.sampling import attributes
from bs_optuna.study import open_study


TASK = """
import os
import signal

import torch
from torch import nn

from bs_optuna.training import TrainingTask


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x):
        if not self.training and len(x) > 64 and type(x) is torch.Tensor:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.layer(x)


def task():
    x = torch.randn(512, 4, generator=torch.Generator().manual_seed(0))
    data = (x, x.sum(1, keepdim=True))
    loss = nn.functional.mse_loss
    few = (x[:100], data[1][:100])
    return TrainingTask(name="large", model=Net, train_data=data, valid_data=few, loss=loss)
"""


@pytest.mark.slow
def test_it_costs_one_attempt_of_the_study(tmp_path: Path) -> None:
    (tmp_path / "large.py").write_text(TASK, encoding="utf-8")
    arguments = ("--trials", "3", "--batch-size", "16:32", "--budget", "steps=20")
    run = run_python("-m", "bs_optuna.tune", "large.py", "--isolate", *arguments, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "Recommended for large" in run.stdout
    killed, *trials = open_study(
        storage=f"sqlite:///{tmp_path}/studies/large.db", name="large"
    ).trials
    assert killed.state == TrialState.FAIL
    reason = "killed by SIGKILL evaluating in pieces of 100"  # all there are
    assert killed.user_attrs[attributes.PRUNE_REASON] == reason
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
    for trial in trials:
        # The microbatch is not to blame, and nobody tries such a piece again.
        assert trial.user_attrs[attributes.MICROBATCH_SIZE] == trial.params["batch_size"]
        assert attributes.MICROBATCH_FAILS not in trial.user_attrs
    again = trials[0].user_attrs
    assert again[attributes.KILLED_EVALUATION] == 100
    assert again[attributes.EVALUATION_FITS] == 50

"""oneDNN runs out of memory for real, stays broken in its thread, and training goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from children import run_python

from bs_optuna.training.onednn import give_up_onednn
from bs_optuna.training.oom import classify


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot limit a CPU's memory")
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="built without oneDNN")
def test_a_thread_goes_on_without_onednn() -> None:
    run = run_python(str(Path(__file__).with_name("real_onednn.py")))
    assert run.returncode == 0, run.stderr
    assert not run.stderr.count("Traceback"), run.stderr
    found = json.loads(run.stdout)
    assert found == {
        "sizes_tried": [5],  # the same size again: what failed was oneDNN
        "passes": 2,
        "spoiled": True,
        "enabled": True,
        "again": [5],
        "evaluation_passes": 2,
        "evaluation_spoiled": True,
        "main_thread_spoiled": False,
    }


def test_other_failures_leave_onednn_alone() -> None:
    verdict = classify(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB."))
    assert verdict is not None
    assert not give_up_onednn(verdict)

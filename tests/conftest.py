"""What every test shares: helpers and benchmarks on the path, one thread, quiet Optuna."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import optuna
import pytest
import threadpoolctl
import torch


sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # they import each other by name
# What a shell runs in the background ignores Ctrl-C, and so would the processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Two tests run at a time: threads that wait for each other only cost time, here and in the
# processes that tests start.
threadpoolctl.threadpool_limits(1)
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
optuna.logging.set_verbosity(optuna.logging.WARNING)


def pytest_configure(config: pytest.Config) -> None:
    # Programs that tests start, with limits on the CPU's memory, would train on a GPU instead.
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

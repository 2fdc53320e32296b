"""What a tensor takes is what the C library takes, in a process started for a limit."""

from __future__ import annotations

import sys

import pytest
from limited_process import run

from bs_optuna.training.live_storages import PAGE_BYTES
from bs_optuna.training.live_storages import allocated_bytes


TENSORS = 512


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another C library")
@pytest.mark.parametrize("size", [16_000, 16_384, 20_300, 20_400, 65_400, 65_450, 2**20])
def test_a_tensor_takes_whole_pages(size: int) -> None:
    program = f"""
        # What has become free in the heap so far is used up.
        fill = [bytearray(n) for n in (16_000, 9000, 4000, 2000, 1000) for _ in range(1500)]
        torch.empty(2**20)
        before = process_memory("VmData")["VmData"]
        kept = [torch.empty({size}, dtype=torch.uint8) for _ in range({TENSORS})]
        print(process_memory("VmData")["VmData"] - before)
    """
    grown = int(run(program)) / TENSORS
    # Each tensor is a Python object too, and a few find room in what the heap still had.
    assert abs(grown - allocated_bytes(size, "cpu")) < PAGE_BYTES / 2

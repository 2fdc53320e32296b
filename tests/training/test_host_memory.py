"""What a machine has left is told as the kernel tells it, also in a container, also for real."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from memory_group import memory_group
from memory_group import python

from bs_optuna.training.host_memory import free_host_bytes
from bs_optuna.training.host_memory import total_host_bytes


MIB = 2**20
GIB = 2**30
UNLIMITED = 9223372036854771712  # what version 1 says then
linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux tells it")


class Kernel:
    """The files in which a kernel tells of memory, in a folder."""

    def __init__(self, folder: Path, *, available: int) -> None:
        self.proc = folder / "proc"
        self.groups = folder / "groups"
        (self.proc / "self").mkdir(parents=True)
        self.groups.mkdir()
        (self.proc / "meminfo").write_text(
            f"MemTotal: 99999999 kB\nMemAvailable:   {available // 1024} kB\n"
        )
        self.mounted()

    def mounted(self, root: str = "/", kind: str = "cgroup2", options: str = "rw") -> None:
        (self.proc / "self/mountinfo").write_text(
            "23 1 8:1 / / rw - ext4 /dev/root rw\n"
            "32 31 0:29 / /nowhere rw,relatime - cgroup cgroup rw,cpu\n"
            f"41 31 0:38 {root} {self.groups} rw,relatime shared:9 - {kind} {kind} {options}\n"
        )

    def belongs_to(self, line: str) -> None:
        (self.proc / "self/cgroup").write_text(f"3:cpu:/elsewhere\n{line}\n")

    def group(self, path: str, **files: object) -> None:
        folder = self.groups / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (folder / f"memory.{name}").write_text(f"{value}\n")


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path, available=8 * GIB)


def test_without_groups_it_is_what_the_machine_has(kernel: Kernel) -> None:
    assert free_host_bytes(kernel.proc) == 8 * GIB
    assert total_host_bytes(kernel.proc) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_group_limits_what_is_left_but_for_pages_of_files(kernel: Kernel) -> None:
    kernel.belongs_to("0::/job")
    kernel.group("job", max=GIB, current=300 * MIB, stat=f"anon 5\ninactive_file {100 * MIB}")
    assert free_host_bytes(kernel.proc) == GIB - 200 * MIB
    assert total_host_bytes(kernel.proc) == GIB


def test_the_tightest_of_nested_groups_counts(kernel: Kernel) -> None:
    kernel.belongs_to("0::/batch/job/step")
    kernel.group("batch", max=2 * GIB, high="max", current=2 * GIB - 50 * MIB)
    kernel.group("batch/job", max=GIB, high=500 * MIB, current=400 * MIB)
    kernel.group("batch/job/step", max="max", high="max", current=400 * MIB)
    assert free_host_bytes(kernel.proc) == 50 * MIB
    assert total_host_bytes(kernel.proc) == 500 * MIB


@pytest.mark.parametrize("inside", ["/docker/1234", "/docker/1234/sub", "/lost"])
def test_in_a_container_its_own_group_is_the_topmost(kernel: Kernel, inside: str) -> None:
    kernel.mounted("/docker/1234", "cgroup", "rw,memory")
    kernel.belongs_to(f"4:hugetlb,memory:{inside}")
    kernel.group("", limit_in_bytes=GIB, usage_in_bytes=100 * MIB)
    kernel.group("sub", limit_in_bytes=UNLIMITED, usage_in_bytes=100 * MIB)
    assert free_host_bytes(kernel.proc) == GIB - 100 * MIB


def test_a_group_that_is_over_its_limit_has_nothing_left(kernel: Kernel) -> None:
    kernel.belongs_to("0::/")
    kernel.group("", high=GIB, current=2 * GIB)
    assert free_host_bytes(kernel.proc) == 0


def test_other_systems_say_nothing(tmp_path: Path) -> None:
    assert free_host_bytes(tmp_path) is None
    (tmp_path / "meminfo").write_text("MemFree: 5 kB\n")
    assert free_host_bytes(tmp_path) is None


@linux
def test_what_this_process_takes_is_no_longer_free() -> None:
    before = free_host_bytes()
    held = np.ones(1536 * MIB // 8)  # far more than other tests give back meanwhile
    assert before is not None
    deadline = time.monotonic() + 30
    while True:  # some kernels tell it late
        after = free_host_bytes()
        assert after is not None
        if before - after > 768 * MIB:
            break
        assert time.monotonic() < deadline, (before, after)
        time.sleep(0.05)
    assert held[0] == 1


READS = """
from bs_optuna.training.host_memory import free_host_bytes, total_host_bytes
before = free_host_bytes()
held = bytearray(b"1") * (100 * 2**20)
print(total_host_bytes(), before, before - free_host_bytes())
"""


@linux
def test_a_real_group_limits_it(tmp_path: Path) -> None:
    with memory_group(300) as group:
        run = python(group, "-c", READS, folder=tmp_path)
    total, free, held = map(int, run.stdout.split())
    assert total == 300 * MIB, run.stderr
    assert 200 * MIB < free < 300 * MIB
    assert held == pytest.approx(100 * MIB, abs=5 * MIB)

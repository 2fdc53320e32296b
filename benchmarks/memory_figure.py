"""What benchmarks/memory.py measured, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt


COLORS = ("#0b6e99", "#b0b7bd", "#d9a441", "#c46a4a")


def draw(rows: Mapping[int, Mapping[str, Mapping[str, Any]]], path: Path) -> None:
    """Draws what each system found, and what it cost, for each limit.

    Args:
        rows: By limit in MiB and system: ``size``, ``truth``, ``failed`` and ``works``.
        path: The picture to write.
    """
    systems = list(dict.fromkeys(system for row in rows.values() for system in row))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    width = 0.8 / len(systems)
    for k, system in enumerate(systems):
        for n, row in enumerate(rows.values()):
            if system not in row:
                continue
            found, where = row[system], n + (k - (len(systems) - 1) / 2) * width
            color = COLORS[k % len(COLORS)]
            label = system if n == 0 else None
            part = 100 * found["size"] / found["truth"]
            left.bar(where, part, 0.9 * width, color=color, label=label)
            if not found["works"]:
                left.text(where, part + 2, "dies", ha="center", fontsize=7, color=color)
            right.bar(where, found["failed"], 0.9 * width, color=color)
            right.text(
                where, found["failed"] + 0.4, found["failed"], ha="center", fontsize=7, color=color
            )
    left.axhline(100, color="#444444", linewidth=0.8, linestyle=":")
    left.set_title("Microbatch found, % of the largest that trains", fontsize=10)
    right.set_title("Attempts that ran out of memory", fontsize=10)
    for axes in (left, right):
        axes.set_xticks(range(len(rows)), [f"{mib} MiB" for mib in rows])
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=0)
    figure.legend(loc="outside lower center", ncols=len(systems), frameon=False)
    figure.savefig(path, dpi=150)

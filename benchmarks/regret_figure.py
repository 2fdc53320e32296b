"""The picture of a comparison: regret against trials, one panel for each source."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1b2a41"
LINES = {  # name and colour of each sampler
    "coupled": ("CoupledSampler", "#e4572e"),
    "tpe": ("TPE", "#2e86ab"),
    "tpe, 3 random": ("TPE, 3 random trials", "#7cb8d4"),
    "gp, 3 random": ("GP, 3 random trials", "#4c956c"),
    "botorch, 3 random": ("BoTorch, 3 random trials", "#8d6bb8"),
    "cmaes": ("CMA-ES", "#d9a404"),
    "random": ("random", "#9aa5b1"),
}
LOWEST = 1e-3


def regret_figure(curves: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Draws the mean regret of every sampler and one standard error on either side.

    Args:
        curves: Regrets (runs, trials) by source and sampler.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the extra ``plot`` brings it.
    """
    from matplotlib.figure import Figure  # an extra, and slow to load

    figure = Figure(figsize=(9.6, 4.4), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axes, (source, found) in zip(panels, curves.items(), strict=True):
        for name, regrets in found.items():
            _draw(axes, name, regrets)
        _dress(axes, source)
    panels[0].set_ylabel("regret (1: a middling setting)", color=INK)
    lines, names = panels[0].get_legend_handles_labels()
    figure.legend(
        lines, names, loc="outside right center", frameon=False, fontsize=9, labelcolor=INK
    )
    return figure


def _draw(axes: Axes, name: str, regrets: np.ndarray) -> None:
    mean = regrets.mean(0)
    error = regrets.std(0, ddof=1) / np.sqrt(len(regrets))
    trials = np.arange(1, len(mean) + 1)
    ours = name == "coupled"
    label, colour = LINES[name]
    order = 3 if ours else 2
    axes.fill_between(
        trials,
        np.maximum(mean - error, LOWEST),
        np.maximum(mean + error, LOWEST),
        color=colour,
        alpha=0.2 if ours else 0.09,
        linewidth=0,
        zorder=order,
    )
    axes.plot(trials, mean, c=colour, lw=2.6 if ours else 1.5, label=label, zorder=order)


def _dress(axes: Axes, source: str) -> None:
    axes.set_title(source, color=INK, fontsize=11, loc="left")
    axes.set_yscale("log")
    axes.set_ylim(LOWEST, 2.0)
    axes.margins(x=0.01)
    axes.set_xlabel("trials", color=INK)
    axes.grid(True, which="major", color="#e5e9ee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)

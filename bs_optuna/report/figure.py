"""The picture of a study: trials over batch size and learning rate, and the ridge they support."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import optuna

from bs_optuna.report.ridge import Ridge
from bs_optuna.report.ridge import read_ridge


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASH = 1.1  # factor from a batch size to each end of its dash, if it is the only one
INK = "#1b2a41"
RIDGE = "#e4572e"
MIDDLE = "#21918c"  # of the colours of trials


def ridge_figure(
    study: optuna.Study,
    *,
    batch_size_name: str | None = None,
    learning_rate_name: str | None = None,
) -> Figure:
    """Draws every trial, coloured by its value, and the best learning rate with its 90 % interval.

    Args:
        study: A study with the two parameters, whichever sampler made it.
        batch_size_name: Name of the batch size in the study; None, here and below, is the name that
            the study's CoupledSampler was given, or else ``"batch_size"``.
        learning_rate_name: Name of the learning rate in the study; ``"lr"``.

    Raises:
        StudyError: There are too few trials to say where the best learning rate lies, or the two
            parameters are not both positive numbers.
        ModuleNotFoundError: matplotlib is not installed; the extra ``plot`` brings it.
    """
    from matplotlib.figure import Figure  # an extra, and slow to load

    ridge = read_ridge(
        study, batch_size_name=batch_size_name, learning_rate_name=learning_rate_name
    )
    figure = Figure(figsize=(7.2, 4.4), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    _draw_ridge(axes, ridge)
    if ridge.pruned:
        axes.scatter(
            [point.batch_size for point in ridge.pruned],
            [point.learning_rate for point in ridge.pruned],
            marker="x",
            c="#9aa5b1",
            s=30,
            label="pruned",
        )
    dots = axes.scatter(
        [point.batch_size for point in ridge.complete],
        [point.learning_rate for point in ridge.complete],
        c=[point.rank for point in ridge.complete],
        cmap="viridis",
        s=52,
        edgecolors="white",
        linewidths=0.8,
        zorder=3,
    )
    axes.scatter([], [], c=MIDDLE, s=52, edgecolors="white", linewidths=0.8, label="complete")
    size, rate = ridge.recommended
    axes.scatter(
        [size],
        [rate],
        s=170,
        facecolors="none",
        edgecolors=RIDGE,
        linewidths=1.8,
        zorder=4,
        label="recommended",
    )
    bar = figure.colorbar(dots, ax=axes, ticks=[0, 1], pad=0.02)
    bar.ax.set_yticklabels(["worst", "best"])
    bar.outline.set_visible(False)
    _dress(axes, ridge.tried)
    return figure


def _draw_ridge(axes: Axes, ridge: Ridge) -> None:
    low, high, best = ridge.low, ridge.high, ridge.best
    places: Sequence[float] = ridge.batch_sizes
    if len(places) == 1:  # a line needs two points; this is a dash
        (size,) = places
        places = [size / DASH, size * DASH]
        low, high, best = low * 2, high * 2, best * 2
        axes.set_xlim(size / 2, size * 2)
    axes.fill_between(
        places, low, high, color=RIDGE, alpha=0.13, linewidth=0, label="90 % interval"
    )
    axes.plot(places, best, c=RIDGE, lw=2, label="best learning rate")
    # The band may leave the plot where nothing was tried; trials and line decide what is shown.
    axes.set_ylim(min(ridge.rates) / 1.6, max(ridge.rates) * 1.6)


def _dress(axes: Axes, sizes: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = 2.0 ** np.arange(np.floor(np.log2(sizes[0])), np.ceil(np.log2(sizes[-1])) + 1)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("batch size", color=INK)
    axes.set_ylabel("learning rate", color=INK)
    axes.grid(True, which="major", color="#e5e9ee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="best", labelcolor=INK)

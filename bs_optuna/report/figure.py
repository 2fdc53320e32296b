"""The picture of a study: trials over batch size and learning rate, and the ridge they support."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import optuna
from optuna.trial import TrialState
from scipy.stats import rankdata

from bs_optuna.errors import StudyError
from bs_optuna.sampling.recommend import names_in
from bs_optuna.sampling.recommend import recommend_each


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 9  # batch sizes at which the study is asked for the best learning rate
DASH = 1.1  # factor from a batch size to each end of its dash, if it is the only one
INK = "#1b2a41"
RIDGE = "#e4572e"


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

    named = names_in(study, batch_size_name, learning_rate_name)
    names = (named.batch_size, named.learning_rate)
    complete = [
        (trial.params[names[0]], trial.params[names[1]], trial.value)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if all(name in trial.params for name in names)
    ]
    if not complete:
        raise StudyError(
            f"Study {study.study_name!r} has no complete trial with the parameters {names[0]!r} "
            f"and {names[1]!r} to draw. Run some, or name them with batch_size_name and "
            "learning_rate_name."
        )
    pruned = [
        (trial.params[names[0]], trial.params[names[1]])
        for trial in study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))
        if all(name in trial.params for name in names)
    ]
    tried = [point[0] for point in (*complete, *pruned)]
    if not all(isinstance(size, int | float) and size > 0 for size in tried):
        raise StudyError(
            f"Parameter {names[0]!r} of study {study.study_name!r} is not always a positive "
            "number; name one that is with batch_size_name."
        )
    figure = Figure(figsize=(7.2, 4.4), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    sizes = np.geomspace(min(tried), max(tried), POINTS)
    _draw_ridge(axes, study, sorted({round(size) for size in sizes}), names)
    if pruned:
        axes.scatter(
            [p[0] for p in pruned],
            [p[1] for p in pruned],
            marker="x",
            c="#9aa5b1",
            s=30,
            label="pruned",
        )
    dots = axes.scatter(
        [c[0] for c in complete],
        [c[1] for c in complete],
        c=_ranks([c[2] or 0.0 for c in complete], study),
        cmap="viridis",
        s=52,
        edgecolors="white",
        linewidths=0.8,
        zorder=3,
        label="complete",
    )
    bar = figure.colorbar(dots, ax=axes, ticks=[0, 1], pad=0.02)
    bar.ax.set_yticklabels(["worst", "best"])
    bar.outline.set_visible(False)
    _dress(axes, sorted(tried))
    return figure


def _draw_ridge(
    axes: Axes, study: optuna.Study, sizes: Sequence[int], names: tuple[str, str]
) -> None:
    found = recommend_each(study, sizes, batch_size_name=names[0], learning_rate_name=names[1])
    low, high = zip(*(f.learning_rate_interval for f in found), strict=True)
    best = [f.learning_rate for f in found]
    places: Sequence[float] = sizes
    if len(sizes) == 1:  # a line needs two points; this is a dash
        places = [sizes[0] / DASH, sizes[0] * DASH]
        low, high, best = low * 2, high * 2, best * 2
        axes.set_xlim(sizes[0] / 2, sizes[0] * 2)
    axes.fill_between(
        places, low, high, color=RIDGE, alpha=0.13, linewidth=0, label="90 % interval"
    )
    axes.plot(places, best, c=RIDGE, lw=2, label="best learning rate")
    # The band may leave the plot where nothing was tried; trials and line decide what is shown.
    rates = [t.params[names[1]] for t in study.get_trials(deepcopy=False) if names[1] in t.params]
    axes.set_ylim(min(*rates, *best) / 1.6, max(*rates, *best) * 1.6)


def _ranks(
    values: list[float], study: optuna.Study
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """0 for the worst trial to 1 for the best: losses of 11 beside 0.1 would hide all else."""
    order: np.ndarray[tuple[int], np.dtype[np.float64]]
    order = (rankdata(values) - 1.0) / max(1, len(values) - 1)  # equal ones share a colour
    return order if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1.0 - order


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

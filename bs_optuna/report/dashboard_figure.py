"""The picture of a study on its page in optuna-dashboard, where points tell what they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import optuna

from bs_optuna.errors import StudyError
from bs_optuna.report.ridge import Ridge
from bs_optuna.report.ridge import read_ridge


if TYPE_CHECKING:
    from plotly.graph_objects import Figure

GRAPH = "bs_optuna"  # without a colon, with which the dashboard shows no study at all
RIDGE = "#e4572e"
BAND = "rgba(228, 87, 46, 0.15)"
GREY = "#9aa5b1"
MIDDLE = "#21918c"  # of the colours of trials


def publish_figure(study: optuna.Study) -> bool:
    """Puts the picture on the study's page, in the place of an older one.

    Returns:
        Whether there are enough trials for one.
    """
    from optuna_dashboard import save_plotly_graph_object

    try:
        ridge = read_ridge(study)
    except StudyError:
        return False
    save_plotly_graph_object(study, draw(ridge), graph_object_id=GRAPH)
    return True


def draw(ridge: Ridge) -> Figure:
    """The picture; it takes the size of the place where it is shown."""
    from plotly.graph_objects import Figure  # takes half a second
    from plotly.graph_objects import Scatter

    sizes = ridge.batch_sizes
    edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    figure = Figure()
    figure.add_trace(Scatter(x=sizes, y=ridge.high, showlegend=False, **edge))
    figure.add_trace(
        Scatter(x=sizes, y=ridge.low, fill="tonexty", fillcolor=BAND, name="90 % interval", **edge)
    )
    figure.add_trace(
        Scatter(
            x=sizes,
            y=ridge.best,
            mode="lines" if len(sizes) > 1 else "markers",
            line={"color": RIDGE, "width": 3},
            marker={"color": RIDGE, "symbol": "line-ew-open", "size": 24},
            name="best learning rate",
            customdata=[list(ends) for ends in zip(ridge.low, ridge.high, strict=True)],
            hovertemplate="batch size %{x}<br>best learning rate %{y:.3g}"
            "<br>%{customdata[0]:.2g} to %{customdata[1]:.2g}<extra></extra>",
        )
    )
    figure.add_trace(
        Scatter(
            x=[point.batch_size for point in ridge.pruned],
            y=[point.learning_rate for point in ridge.pruned],
            mode="markers",
            marker={"color": GREY, "symbol": "x-thin-open", "size": 8},
            name="pruned",
            text=[f"trial {point.number}, pruned" for point in ridge.pruned],
            hovertemplate="%{text}<br>batch size %{x}<br>learning rate %{y:.3g}<extra></extra>",
        )
    )
    figure.add_trace(
        Scatter(
            x=[point.batch_size for point in ridge.complete],
            y=[point.learning_rate for point in ridge.complete],
            mode="markers",
            marker={
                "color": [point.rank for point in ridge.complete],
                "colorscale": "Viridis",
                "cmin": 0,
                "cmax": 1,
                "size": 11,
                "line": {"color": "white", "width": 1},
                "colorbar": {"tickvals": [0, 1], "ticktext": ["worst", "best"], "thickness": 12},
            },
            showlegend=False,
            text=[f"trial {point.number}: {point.value:.4g}" for point in ridge.complete],
            hovertemplate="%{text}<br>batch size %{x}<br>learning rate %{y:.3g}<extra></extra>",
        )
    )
    named = {"mode": "markers", "hoverinfo": "skip"}
    dot = {"color": MIDDLE, "size": 11}  # one for all colours
    figure.add_trace(Scatter(x=[None], y=[None], marker=dot, name="complete", **named))
    figure.add_trace(
        Scatter(
            x=[ridge.recommended[0]],
            y=[ridge.recommended[1]],
            marker={"color": RIDGE, "symbol": "circle-open", "size": 19, "line": {"width": 2.5}},
            name="recommended",
            **named,
        )
    )
    _dress(figure, ridge)
    return figure


def _dress(figure: Figure, ridge: Ridge) -> None:
    first, last = ridge.tried[0], ridge.tried[-1]
    powers = 2 ** np.arange(np.floor(np.log2(first)), np.ceil(np.log2(last)) + 1)
    low, high = min(ridge.rates) / 1.6, max(ridge.rates) * 1.6
    figure.update_layout(
        template="plotly_white",
        title="Best learning rate for each batch size",
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "xanchor": "left", "x": 0.0},
        margin={"l": 70, "r": 20, "t": 110, "b": 60},
    )
    figure.update_xaxes(
        title="batch size",
        type="log",
        tickvals=powers.tolist(),
        range=[float(np.log10(first / 1.2)), float(np.log10(last * 1.2))],
    )
    # The band may leave the picture where nothing was tried, as in that of matplotlib.
    figure.update_yaxes(
        title="learning rate",
        type="log",
        exponentformat="power",
        dtick=1,
        range=[float(np.log10(low)), float(np.log10(high))],
    )

"""The note of a study in optuna-dashboard: what the summary says, for who opens the study later."""

from __future__ import annotations

from bs_optuna.report.summary import tables
from bs_optuna.study.conclusion import Conclusion
from bs_optuna.study.tuning import Tuning


END = "*Written by bs_optuna, anew each time; what you write below this line stays.*"


def publish(tuning: Tuning, conclusion: Conclusion | None) -> None:
    """Writes the summary into the note of the study, above what a person has written there."""
    # Takes a second, most of it scikit-learn.
    from optuna_dashboard import get_note
    from optuna_dashboard import save_note

    before, end, below = get_note(tuning.study).partition(END)
    own = below if end else before
    parts = [_markdown(title, rows) for title, rows in tables(tuning, conclusion).items()]
    save_note(tuning.study, "\n".join([*parts, END]) + (own if end or not own else f"\n\n{own}"))


def _markdown(title: str, rows: list[tuple[str, str]]) -> str:
    cells = ["| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows)]
    return "\n".join([f"## {title}", "", *cells, ""])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())

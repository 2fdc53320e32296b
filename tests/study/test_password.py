"""What is shown and stored of a storage holds no password."""

from __future__ import annotations

import pytest

from bs_optuna.study.storage import without_password


def test_a_password_is_starred_out() -> None:
    shown = without_password("postgresql://me:secret@host/name")
    assert shown == "postgresql://me:***@host/name"


@pytest.mark.parametrize(
    "storage", ["sqlite:///studies/a.db", "studies/a.journal", "postgresql://me@host/name"]
)
def test_anything_else_is_shown_as_it_is(storage: str) -> None:
    assert without_password(storage) == storage

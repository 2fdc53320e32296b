"""The note of a study holds its summary, and whatever a person has written there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from optuna_dashboard import get_note
from optuna_dashboard import save_note

from bs_optuna.config import StudyConfig
from bs_optuna.report.note import END
from bs_optuna.report.note import publish
from bs_optuna.study.conclusion import as_found
from bs_optuna.study.tuning import Tuning
from bs_optuna.study.tuning import prepare
from bs_optuna.tasks import digits


@pytest.fixture
def tuning(tmp_path: Path) -> Tuning:
    config = StudyConfig(
        trials=2, budget="samples=400", storage=f"{tmp_path}/study.db", device="cpu"
    )
    task = replace(digits.task(), name="dig|its")
    tuning = prepare(config, task)
    tuning.run(timeout=None, started=lambda trial: None, ended=lambda study, trial: None)
    return tuning


def test_the_note_holds_the_summary_as_tables(tuning: Tuning) -> None:
    found = as_found(tuning)
    assert found is not None
    publish(tuning, found)
    lines = get_note(tuning.study).splitlines()
    assert lines[0] == "## Recommended for dig|its"
    assert f"| batch size | {found.batch_size} |" in lines
    assert "## Evidence" in lines
    assert lines[-1] == END
    rows = [line for line in lines if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") == 3 for line in rows)


@pytest.mark.parametrize("first", ["", "mine: *look* at this\n\n| a | b |"])
def test_what_a_person_has_written_stays(tuning: Tuning, first: str) -> None:
    save_note(tuning.study, first)
    publish(tuning, None)
    assert get_note(tuning.study).endswith(first)
    edited = get_note(tuning.study) + "\nand this"
    save_note(tuning.study, edited)
    publish(tuning, as_found(tuning))
    note = get_note(tuning.study)
    assert note.endswith(first + "\nand this")
    assert note.count("## Evidence") == note.count(END) == 1
    publish(tuning, as_found(tuning))
    assert get_note(tuning.study) == note

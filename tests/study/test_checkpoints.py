"""Where checkpoints of a study lie, and which of them stay."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from bs_optuna.errors import ConfigError
from bs_optuna.sampling import attributes
from bs_optuna.study import open_study
from bs_optuna.study.checkpoints import checkpoint_folder


def end_without_a_word(study: optuna.Study, name: str) -> None:
    """A trial whose worker was killed after it had written a checkpoint of that name."""
    stored = {attributes.CHECKPOINT: name}
    study.add_trial(optuna.create_trial(state=TrialState.FAIL, user_attrs=stored))


@pytest.mark.parametrize("name", ["mine.db", "mine.journal"])
def test_checkpoints_lie_beside_the_file_and_those_of_queued_trials_stay(
    tmp_path: Path, name: str
) -> None:
    storage = f"sqlite:///{tmp_path / name}" if name.endswith("db") else str(tmp_path / name)
    study = open_study(storage=storage, name="s")
    with checkpoint_folder(study, storage) as folder:
        assert folder == tmp_path / f"{name}.checkpoints"
        assert not folder.exists()
        folder.mkdir()
        for checkpoint in ("lost.pt", "lost.pt.part", "queued.pt", "of-another-study.pt"):
            (folder / checkpoint).write_text("")
        end_without_a_word(study, "lost.pt")
        end_without_a_word(study, "queued.pt")
        study.enqueue_trial({"x": 0.5}, user_attrs={attributes.CHECKPOINT: "queued.pt"})
    assert {path.name for path in folder.iterdir()} == {"queued.pt", "of-another-study.pt"}


def test_a_folder_that_nothing_is_left_in_goes(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'mine.db'}"
    study = open_study(storage=storage, name="s")
    with checkpoint_folder(study, storage) as folder:
        folder.mkdir()
        (folder / "lost.pt").write_text("")
        end_without_a_word(study, "lost.pt")
    assert not folder.exists()


def test_a_study_on_a_server_has_a_temporary_folder() -> None:
    study = optuna.create_study()
    with checkpoint_folder(study, "postgresql://tester@127.0.0.1/studies") as folder:
        (folder / "one.pt").write_text("")
    assert not folder.exists()


@pytest.mark.parametrize("storage", ["sqlite://", "sqlite:///:memory:"])
def test_a_study_in_memory_cannot_be_shared(storage: str) -> None:
    with (
        pytest.raises(ConfigError, match=r"is in memory.*Name a file"),
        checkpoint_folder(optuna.create_study(), storage),
    ):
        pass

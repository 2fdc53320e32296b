"""A study is resumed only if it is the one that was asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.trial import TrialState

from bs_optuna.errors import StudyError
from bs_optuna.study import open_study
from bs_optuna.study.agreement import check_search_space


PlainStorage = Callable[[str], optuna.storages.RDBStorage]

LR = FloatDistribution(1e-5, 1e-1, log=True)
SPACE: dict[str, BaseDistribution] = {
    "batch_size": IntDistribution(16, 512, log=True),
    "lr": LR,
    "optimizer": CategoricalDistribution(["sgd", "adamw"]),
}


@pytest.fixture
def storage(tmp_path: Path) -> str:
    """A study with one trial of that search space."""
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = open_study(storage=url, name="digits", search_space=SPACE)
    params = {"batch_size": 64, "lr": 1e-3, "optimizer": "sgd"}
    study.add_trial(optuna.create_trial(value=1.0, params=params, distributions=SPACE))
    return url


def test_the_same_search_space_is_resumed(storage: str) -> None:
    study = open_study(storage=storage, name="digits", search_space=SPACE)
    assert len(study.trials) == 1


def test_without_a_search_space_nothing_is_compared(storage: str) -> None:
    assert len(open_study(storage=storage, name="digits").trials) == 1


@pytest.mark.parametrize(
    ("name", "asked", "told"),
    [
        ("lr", FloatDistribution(1e-6, 1e-1, log=True), "not in 1e-06:0.1 (float, log);"),
        ("lr", FloatDistribution(1e-5, 1e-1), "not in 1e-05:0.1 (float);"),
        ("lr", CategoricalDistribution([1e-3, 1e-2]), "not in [0.001, 0.01];"),
        ("batch_size", IntDistribution(16, 1024, log=True), "not in 16:1024 (int, log);"),
        ("batch_size", IntDistribution(16, 512, step=16), "not in 16:512 (int, step 16);"),
        ("batch_size", FloatDistribution(16, 512, log=True), "not in 16.0:512.0 (float, log);"),
        ("optimizer", CategoricalDistribution(["sgd", "lamb"]), "not in ['sgd', 'lamb'];"),
        ("optimizer", CategoricalDistribution(["adamw", "sgd"]), "not in ['adamw', 'sgd'];"),
    ],
)
def test_another_search_space_is_refused(
    storage: str, name: str, asked: BaseDistribution, told: str
) -> None:
    with pytest.raises(StudyError) as caught:
        open_study(storage=storage, name="digits", search_space={**SPACE, name: asked})
    message = str(caught.value)
    assert message.startswith(f"Study 'digits' has {name!r} in ")
    assert told in message
    assert "--study" in message
    assert len(open_study(storage=storage, name="digits").trials) == 1


def test_a_parameter_less(storage: str) -> None:
    with pytest.raises(StudyError, match=r"has 'optimizer' in .*, which was not asked for;"):
        open_study(
            storage=storage,
            name="digits",
            search_space={name: SPACE[name] for name in ("batch_size", "lr")},
        )


def test_a_parameter_more(storage: str) -> None:
    with pytest.raises(StudyError, match=r"has no parameter 'momentum' \(asked for in 0.0:0.99"):
        open_study(
            storage=storage,
            name="digits",
            search_space={**SPACE, "momentum": FloatDistribution(0.0, 0.99)},
        )


def test_a_trial_cut_short_says_nothing_of_the_parameters_it_had_not_drawn() -> None:
    study = optuna.create_study()
    for state in (TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING):
        study.add_trial(
            optuna.create_trial(state=state, params={"lr": 0.1}, distributions={"lr": LR})
        )
    check_search_space(study, SPACE)


@pytest.mark.parametrize(
    ("directions", "found"),
    [(["maximize"], "maximize"), (["minimize", "maximize"], "minimize, maximize")],
)
def test_another_direction_is_refused(
    tmp_path: Path, plain_storage: PlainStorage, directions: list[str], found: str
) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    optuna.create_study(storage=plain_storage(url), study_name="digits", directions=directions)
    with pytest.raises(StudyError, match=f"has the direction {found}, not minimize; use another"):
        open_study(storage=url, name="digits")
    assert len(open_study(storage=url, name="other", direction="maximize").directions) == 1


floats = st.floats(1e-6, 1.0).flatmap(
    lambda low: st.builds(FloatDistribution, st.just(low), st.floats(low, 2.0), log=st.booleans())
)
integers = st.integers(1, 4096).flatmap(
    lambda low: st.builds(IntDistribution, st.just(low), st.integers(low, 8192), log=st.booleans())
)
choices = st.lists(st.integers() | st.text() | st.booleans(), min_size=1, unique_by=repr).map(
    CategoricalDistribution
)


@given(asked=floats | integers | choices)
def test_what_a_database_gives_back_agrees_with_what_was_put_in(asked: BaseDistribution) -> None:
    study = open_study(storage="sqlite:///:memory:", name="s")
    stored = optuna.distributions.json_to_distribution(
        optuna.distributions.distribution_to_json(asked)
    )
    value = stored.to_external_repr(getattr(stored, "low", 0))
    study.add_trial(
        optuna.create_trial(value=1.0, params={"x": value}, distributions={"x": stored})
    )
    check_search_space(study, {"x": asked})

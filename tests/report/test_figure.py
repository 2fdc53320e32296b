"""The picture of a study: its trials, coloured by value, and the ridge that they support."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution

from bs_optuna.errors import StudyError
from bs_optuna.report.figure import ridge_figure
from bs_optuna.sampling import CoupledSampler
from bs_optuna.study.tuning import Tuning


def test_the_picture_is_drawn(tuning: Tuning, tmp_path: Path) -> None:
    ridge_figure(tuning.study).savefig(tmp_path / "ridge.png")
    header = (tmp_path / "ridge.png").read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert int.from_bytes(header[16:20], "big") > 1000


@pytest.mark.parametrize("sizes", [[64], [8, 64]])
def test_the_best_learning_rate_is_in_the_picture(sizes: list[int]) -> None:
    study = optuna.create_study()
    space = {
        "batch_size": IntDistribution(8, 64, log=True),
        "lr": FloatDistribution(1e-5, 1.0, log=True),
    }
    for lr in (1e-5, 2e-5, 4e-5):  # the best lies above all that were tried
        for size in sizes:
            params = {"batch_size": size, "lr": lr}
            value = 1e-5 / lr
            study.add_trial(optuna.create_trial(params=params, distributions=space, value=value))
    axes = ridge_figure(study).axes[0]
    (line,) = axes.lines
    places, rates = line.get_data()
    assert len(set(places)) > 1
    for ends, limits in ((places, axes.get_xlim()), (rates, axes.get_ylim())):
        assert limits[0] < min(ends) <= max(ends) < limits[1]
    assert max(rates) > 1.6 * 4e-5


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_the_picture_goes_by_the_names_of_the_sampler_and_equal_trials_look_alike(
    direction: str,
) -> None:
    sampler = CoupledSampler(batch_size="bs", learning_rate="rate")
    study = optuna.create_study(sampler=sampler, direction=direction)
    sign = 1.0 if direction == "minimize" else -1.0
    space = {
        "bs": IntDistribution(8, 64, log=True),
        "rate": FloatDistribution(1e-5, 1.0, log=True),
    }
    for rate, value in ((1e-3, 1.0), (1e-2, 0.5), (1e-1, 1.0), (2e-2, 0.6)):
        params = {"bs": 16, "rate": rate}
        study.add_trial(optuna.create_trial(params=params, distributions=space, value=sign * value))
    picture = ridge_figure(study).axes[0].collections
    (colours,) = (c.get_array() for c in picture if c.get_array() is not None)
    assert colours is not None
    assert colours[0] == colours[1] < colours[2] < colours[3] == 1.0  # the best is drawn last
    (ring,) = (c for c in picture if c.get_label() == "recommended")
    assert ring.get_offsets().tolist() == [[16, 1e-2]]  # type: ignore[union-attr]


def test_a_study_without_results_has_no_picture() -> None:
    with pytest.raises(StudyError, match="no complete trial"):
        ridge_figure(optuna.create_study())


@pytest.mark.parametrize(
    ("sizes", "rates"),
    [(["16", "64"], [1e-3, 1e-2]), ([0, 64], [1e-3, 1e-2]), ([16, 64], ["1e-3"])],
)
def test_a_study_of_words_has_no_picture(sizes: list[object], rates: list[object]) -> None:
    study = optuna.create_study()
    space = {"batch_size": CategoricalDistribution(sizes), "lr": CategoricalDistribution(rates)}  # type: ignore[arg-type]
    for size in [*sizes, *sizes]:
        params = {"batch_size": size, "lr": rates[0]}
        study.add_trial(optuna.create_trial(params=params, distributions=space, value=1.0))
    with pytest.raises(StudyError, match=r"positive number.*; name"):
        ridge_figure(study)

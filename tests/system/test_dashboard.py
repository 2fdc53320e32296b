"""The study opens in optuna-dashboard: the real program, asked over HTTP like a browser does."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest

from bs_optuna.report.dashboard_figure import publish_figure
from bs_optuna.sampling import attributes
from bs_optuna.sampling.feasibility import mark_memory
from bs_optuna.study import open_study


DEADLINE_S = 120

# What a trial stores, as the objective does it.
STORED: dict[str, Any] = {
    attributes.LEARNING_RATE: 1e-3,
    attributes.EFFECTIVE_BATCH_SIZE: 64,
    attributes.MICROBATCH_SIZE: 16,
    attributes.ACCUMULATION_STEPS: 4,
    attributes.BACKOFFS: 2,
    attributes.PEAK_MEMORY_BYTES: 123_456_789,
    attributes.SECONDS: 1.25,
    attributes.DEVICE: "cpu",
}
REASON = "memory: one sample does not fit"


def objective(trial: optuna.Trial) -> float:
    batch_size = trial.suggest_int("batch_size", 16, 512, log=True)
    lr = trial.suggest_float("lr", 1e-5, 1e-1, log=True)
    trial.report(1.0, step=batch_size)
    for key, value in STORED.items():
        trial.set_user_attr(key, value)
    fits = batch_size <= 256
    mark_memory(trial, fits=fits)
    if not fits:
        trial.set_user_attr(attributes.PRUNE_REASON, REASON)
        raise optuna.TrialPruned(REASON)
    return lr * batch_size


def ask(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=DEADLINE_S) as response:
        return json.load(response)


@contextmanager
def dashboard(storage: str) -> Iterator[str]:
    """Start the program on a free port of loopback; stop it at the end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    program = Path(sys.executable).with_name("optuna-dashboard")
    process = subprocess.Popen(
        [program, storage, "--host", "127.0.0.1", "--port", str(port), "--quiet"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + DEADLINE_S
        while True:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            try:
                ask(f"{url}/api/studies")
                break
            except urllib.error.URLError:
                pass
        yield url
    finally:
        process.terminate()
        process.communicate(timeout=DEADLINE_S)


def user_attrs(shown: dict[str, Any]) -> dict[str, str]:
    return {attr["key"]: attr["value"] for attr in shown["user_attrs"]}


def as_text(attrs: dict[str, Any]) -> dict[str, str]:
    """Attributes as the dashboard sends them: words as they are, everything else as JSON."""
    return {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in attrs.items()
    }


@pytest.mark.slow
def test_a_study_opens_in_the_dashboard_while_it_goes_on(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'studies' / 'digits.db'}"
    study = open_study(storage=storage, name="digits")
    study.set_user_attr(attributes.CONFIG, {"trials": 30})
    study.enqueue_trial({"batch_size": 64, "lr": 1e-3})
    study.enqueue_trial({"batch_size": 512, "lr": 1e-2})
    study.optimize(objective, n_trials=2)

    with dashboard(storage) as url:
        (summary,) = ask(f"{url}/api/studies")["study_summaries"]
        assert (summary["study_name"], summary["directions"]) == ("digits", ["minimize"])

        shown = ask(f"{url}/api/studies/{summary['study_id']}")
        assert user_attrs(shown) == as_text({attributes.CONFIG: {"trials": 30}})
        complete, pruned = shown["trials"]
        assert complete["state"] == "Complete"
        assert complete["values"] == [pytest.approx(0.064)]
        assert {p["name"]: float(p["param_external_value"]) for p in complete["params"]} == {
            "batch_size": 64,
            "lr": 1e-3,
        }
        assert user_attrs(complete) == as_text(STORED)
        assert pruned["state"] == "Pruned"
        assert user_attrs(pruned) == as_text({**STORED, attributes.PRUNE_REASON: REASON})
        assert [trial["number"] for trial in shown["best_trials"]] == [0]
        # What a person can choose as an axis: the numbers are told from the words.
        kinds = {attr["key"]: attr["sortable"] for attr in shown["union_user_attrs"]}
        assert kinds == {
            **{key: not isinstance(value, str) for key, value in STORED.items()},
            attributes.PRUNE_REASON: False,
        }

        # The dashboard and a worker share the file.
        study.enqueue_trial({"batch_size": 32, "lr": 1e-4})
        study.optimize(objective, n_trials=1)
        study_url = f"{url}/api/studies/{summary['study_id']}"
        deadline = time.monotonic() + DEADLINE_S
        while len(trials := ask(study_url)["trials"]) < 3 or trials[2]["state"] != "Complete":
            assert time.monotonic() < deadline
        assert [trial["number"] for trial in ask(study_url)["best_trials"]] == [2]


@pytest.mark.slow
def test_the_ridge_is_on_the_page_of_a_study(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'ridge.db'}"
    study = open_study(storage=storage, name="ridge")
    assert not publish_figure(study)
    for batch_size, lr in ((16, 1e-3), (64, 2e-3), (256, 4e-3), (64, 1e-2), (512, 1e-2)):
        study.enqueue_trial({"batch_size": batch_size, "lr": lr})
    study.optimize(objective, n_trials=4)
    assert publish_figure(study)
    study.optimize(objective, n_trials=1)
    assert publish_figure(study)  # in the place of the first

    with dashboard(storage) as url:
        (summary,) = ask(f"{url}/api/studies")["study_summaries"]
        (shown,) = ask(f"{url}/api/studies/{summary['study_id']}")["plotly_graph_objects"]
    figure = json.loads(shown["graph_object"])
    traces = {trace.get("name"): trace for trace in figure["data"]}
    (complete,) = (t for t in figure["data"] if "trial 1: 0.128" in t.get("text", ()))
    assert complete["text"][-1] == "trial 0: 0.016"  # the best is drawn last
    assert traces["recommended"]["x"] == [16]
    assert traces["pruned"]["text"] == ["trial 4, pruned"]
    assert len(traces["best learning rate"]["x"]) == 9
    # With a size of its own the dashboard would cut it off.
    assert not {"width", "height"} & figure["layout"].keys()

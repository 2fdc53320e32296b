"""``python -m bs_optuna.tune``: find batch size and learning rate of a task, in a study to open."""

from __future__ import annotations

import argparse
import difflib
import io
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING
from typing import NoReturn

from bs_optuna.config import StudyConfig
from bs_optuna.config import make_config
from bs_optuna.errors import EXIT_INTERRUPTED
from bs_optuna.errors import EXIT_TERMINATED
from bs_optuna.errors import ConfigError
from bs_optuna.errors import TrainingError
from bs_optuna.errors import UserError
from bs_optuna.forks import end_forks_by_sigterm
from bs_optuna.process_limits import check_limits
from bs_optuna.process_limits import refused
from bs_optuna.tracebacks import print_traceback
from bs_optuna.training.limit_environment import LIMIT_ENVIRONMENT
from bs_optuna.training.limit_environment import is_prepared


if TYPE_CHECKING:
    from rich.console import Console

    from bs_optuna.report.progress import Verbosity
    from bs_optuna.study.tuning import Tuning
    from bs_optuna.training.task import TrainingTask

PROGRAM = "python -m bs_optuna.tune"
UNKNOWN = "unrecognized arguments: "  # how argparse begins to say so
EXIT_NO_RESULT = 1
EXIT_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        0; 1 if no trial could be completed or the task's own code raised an error; 2 after another
        mistake of the user; 130 after Ctrl-C, 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    terminations: list[int] = []
    try:
        status = _tune(arguments, terminations)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except TrainingError as error:
        if error.__cause__ is not None and (limited := refused(error.__cause__)) is not None:
            print(f"error: {limited}", file=sys.stderr)
            return EXIT_USER_ERROR
        if error.__cause__ is not None:  # else a worker process has shown it
            print_traceback(error.__cause__)
        print(f"error: {error}", file=sys.stderr)
        return EXIT_NO_RESULT
    except KeyboardInterrupt:
        print("Interrupted before the first trial.", file=sys.stderr)
        status = EXIT_INTERRUPTED
    except (MemoryError, ImportError, SystemError) as error:
        if (limited := refused(error)) is None:
            raise
        print(f"error: {limited}", file=sys.stderr)
        return EXIT_USER_ERROR
    return EXIT_TERMINATED if status == EXIT_INTERRUPTED and terminations else status


def _tune(arguments: list[str], terminations: list[int]) -> int:
    options = vars(_parser().parse_args(arguments))
    verbosity: Verbosity = options.pop("verbosity")
    show_config = options.pop("show_config")
    dry_run = options.pop("dry_run")
    target = options.pop("target", None)
    path = Path(target) if target is not None and target.endswith(".toml") else None
    if target is not None and path is None:
        if "task" in options:
            raise ConfigError(f"task={options['task']} and {target}; name one of them.")
        options["task"] = target
    config = make_config(path, options)
    if show_config:
        print(config.as_toml())
        return 0
    check_limits()
    _prepare_process(config, arguments)
    if dry_run:
        return _dry_run(config)
    with _sigterm_as_ctrl_c(terminations):
        return _run(config, arguments, verbosity)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Find batch size and learning rate of a task together. Without arguments: a "
        "small convolutional network on handwritten digits.",
        epilog="Every setting may also stand in a TOML file, under its name with underscores. "
        "The same command again goes on with the study, also after Ctrl-C and SIGTERM.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "target", nargs="?", help="STUDY.toml, or a task: digits, text, FILE.py or MODULE:NAME"
    )
    settings = parser.add_argument_group("settings")
    for name, setting in StudyConfig.model_fields.items():
        text = (setting.description or "").replace("%", "%%")
        if setting.default is not None and "default" not in text:
            default = setting.default
            shown = ":".join(map(str, default)) if isinstance(default, tuple) else default
            text += f" (default: {shown})"
        flag = "--" + name.replace("_", "-")
        if setting.annotation is bool:
            settings.add_argument(flag, dest=name, action="store_true", help=setting.description)
            continue
        settings.add_argument(flag, dest=name, metavar=name.split("_")[-1].upper(), help=text)
    parser.add_argument(
        "--show-config", action="store_true", default=False, help="print the settings and stop"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        default=False,
        help="print what memory each batch size is predicted to take and stop",
    )
    loudness = parser.add_mutually_exclusive_group()
    for word, text in (("quiet", "no progress"), ("verbose", "a line per trial in a terminal too")):
        loudness.add_argument(
            f"--{word}",
            dest="verbosity",
            action="store_const",
            const=word,
            default="normal",
            help=text,
        )
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        remedy = f"see {PROGRAM} --help."
        if message.startswith(UNKNOWN):
            flag = message.removeprefix(UNKNOWN).split()[0].partition("=")[0]
            known = [name for name in self._option_string_actions if name.startswith("--")]
            close = difflib.get_close_matches(flag, known, n=1, cutoff=0.7)
            remedy = f"did you mean {close[0]}?" if close else remedy
        raise ConfigError(f"{message}; {remedy}")


def _dry_run(config: StudyConfig) -> int:
    from rich.console import Console

    from bs_optuna.report.forecast import forecast
    from bs_optuna.study.task_errors import named_errors
    from bs_optuna.study.task_errors import set_up_of
    from bs_optuna.tasks.loading import load_task

    with named_errors(set_up_of(config.task)):
        Console().print(forecast(config, load_task(config.task)))
    return 0


def _prepare_process(config: StudyConfig, arguments: list[str]) -> None:
    """Starts this program anew if its allocator must be set up before PyTorch is loaded."""
    on_cpu = config.device in ("auto", "cpu") and sys.platform == "linux"
    if config.memory_limit is not None and on_cpu and not is_prepared():
        command = [sys.executable, "-m", "bs_optuna.tune", *arguments]
        os.execve(sys.executable, command, {**os.environ, **LIMIT_ENVIRONMENT})


@contextmanager
def _sigterm_as_ctrl_c(terminations: list[int]) -> Iterator[None]:
    """A context in which SIGTERM does what Ctrl-C does; the first one is noted in the list."""
    if threading.current_thread() is not threading.main_thread():
        yield  # no signal is heard here
        return
    end_forks_by_sigterm()
    ctrl_c = signal.getsignal(signal.SIGINT)

    def terminate(number: int, frame: FrameType | None) -> None:
        if not terminations:  # timeout(1) sends it twice, and the second would cut the tidying up
            terminations.append(number)
            signal.raise_signal(signal.SIGINT)

    def interrupt(number: int, frame: FrameType | None) -> None:
        if terminations or ctrl_c is not signal.SIG_IGN:  # a shell's background ignores Ctrl-C
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, ctrl_c)
        signal.signal(signal.SIGTERM, before)


def _run(config: StudyConfig, arguments: list[str], verbosity: Verbosity) -> int:
    # From here on with PyTorch and Optuna, whose import takes longer than all of the above.
    from rich.console import Console

    from bs_optuna.study.storage_errors import named_storage_errors
    from bs_optuna.study.task_errors import named_errors
    from bs_optuna.study.task_errors import set_up_of
    from bs_optuna.study.tuning import storage_of
    from bs_optuna.tasks.loading import load_task
    from bs_optuna.worker import set_up_libraries

    set_up_libraries()
    # Names and reasons may hold brackets, and some terminals no more than ASCII.
    console = Console(markup=False, highlight=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    with named_errors(set_up_of(config.task)):
        task = load_task(config.task)
    with named_storage_errors(storage_of(config, task)):
        return _run_task(task, config, arguments, console, verbosity)


def _run_task(
    task: TrainingTask,
    config: StudyConfig,
    arguments: list[str],
    console: Console,
    verbosity: Verbosity,
) -> int:
    from bs_optuna.report.dashboard_figure import publish_figure
    from bs_optuna.report.note import publish
    from bs_optuna.report.summary import LINE_WIDTH
    from bs_optuna.report.summary import summary
    from bs_optuna.study.conclusion import as_found
    from bs_optuna.study.conclusion import conclude
    from bs_optuna.study.tuning import prepare

    tuning = prepare(config, task)
    try:
        if config.trials:
            _search(tuning, config, console, verbosity)
            with console.status("training the recommended setting anew"):
                conclusion = conclude(tuning, final_runs=config.final_runs)
        else:
            conclusion = as_found(tuning)
    except KeyboardInterrupt:
        again = shlex.join(["python", "-m", "bs_optuna.tune", *arguments])
        console.print(
            f"\nInterrupted. Finished trials are kept in {tuning.storage}: {tuning.finished}; "
            f"go on with:\n  {again}",
            soft_wrap=True,
        )
        return EXIT_INTERRUPTED
    width = console.width - 1 if console.is_terminal else LINE_WIDTH
    console.print(summary(tuning, conclusion, width=width), soft_wrap=True)
    if config.trials:
        publish(tuning, conclusion)
        publish_figure(tuning.study)
    return 0 if conclusion is not None else EXIT_NO_RESULT


def _search(tuning: Tuning, config: StudyConfig, console: Console, verbosity: Verbosity) -> None:
    from bs_optuna.report.progress import TrialProgress
    from bs_optuna.study.checkpoints import checkpoint_folder
    from bs_optuna.study.workers import run_in_workers
    from bs_optuna.worker import work

    if verbosity != "quiet":
        done = f", {tuning.finished} of {tuning.trials} trials are done" if tuning.finished else ""
        console.print(
            f"Study {tuning.study.study_name} in {tuning.storage}{done}; every trial gets "
            f"{tuning.objective.budget} on {tuning.objective.device}.",
            soft_wrap=True,
        )
    with TrialProgress(
        console, total=tuning.trials, finished=tuning.finished, verbosity=verbosity
    ) as progress:
        if config.worker_processes == 0:
            tuning.run(timeout=config.timeout, started=progress.started, ended=progress.ended)
            return
        with checkpoint_folder(tuning.study, tuning.storage) as folder:
            run_in_workers(
                tuning,
                partial(work, config, folder),
                count=config.worker_processes,
                timeout=config.timeout,
                started=progress.started,
                ended=progress.ended,
            )


if __name__ == "__main__":
    sys.exit(main())

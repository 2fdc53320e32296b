"""StudyConfig: every setting of a study, typed and validated, from flags and a TOML file.

Loads neither PyTorch nor Optuna, so that a mistake and ``--help`` are answered at once.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated
from typing import Any
from typing import Literal

from pydantic import BaseModel
from pydantic import BeforeValidator
from pydantic import ConfigDict
from pydantic import Field
from pydantic import ValidationError

from bs_optuna.errors import ConfigError
from bs_optuna.training.budget import Budget


_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**n for n, prefix in enumerate("kMGT", 1)}
_UNITS |= {f"{prefix}iB": 1024**n for n, prefix in enumerate("KMGT", 1)}
SMALLEST_MEMORY_LIMIT = 2**20


def _pair(text: object) -> object:
    """``"16:512"`` as ["16", "512"]; a single number is both ends."""
    if isinstance(text, str):
        low, _, high = text.partition(":")
        return [low, high or low]
    return [text, text] if isinstance(text, int | float) else text


def _ordered(name: str, pair: Any, number: type) -> Any:
    wrong = ValueError(f"must be LOW:HIGH with 0 < LOW <= HIGH, as in {name}")
    try:
        ends = list(_pair(pair))  # type: ignore[call-overload]
        low, high = (_exactly(number, end) for end in ends)
    except (TypeError, ValueError, OverflowError):
        raise wrong from None
    if not 0 < low <= high < float("inf"):
        raise wrong
    return low, high


def _exactly(number: type, value: Any) -> Any:
    """The value as a number of that type; a ValueError if it is another one, or a boolean."""
    found = number(value)
    if isinstance(value, bool) or not (isinstance(value, str) or value == found):
        raise ValueError
    return found


def _number(value: object) -> object:
    """Booleans are numbers to Python, and a mistake here."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _batch_sizes(value: object) -> object:
    return _ordered("16:512", value, int)


def _learning_rates(value: object) -> object:
    return None if value is None else _ordered("1e-5:1e-1", value, float)


def _reference(value: object) -> object:
    if value is None:
        return None
    try:
        ends: Any = value.split(":") if isinstance(value, str) else value
        batch_size, learning_rate = ends
        found = _exactly(int, batch_size), _exactly(float, learning_rate)
    except (TypeError, ValueError, OverflowError):
        found = (0, 0.0)
    if not (found[0] > 0 and 0 < found[1] < float("inf")):
        raise ValueError("must be BATCH_SIZE:LEARNING_RATE, both above 0, as in 256:3e-4")
    return found


def _budget(value: object) -> object:
    if value is not None:
        Budget.parse(str(value))  # its errors name the value and the remedy
    return value


def parse_bytes(value: object) -> object:
    """``"512MiB"`` as a number of bytes; numbers and None pass."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        if match is None or match[2] not in _UNITS:
            raise ValueError("must be a number of bytes with a unit, as in 512MiB or 8GiB")
        value = int(float(match[1]) * _UNITS[match[2]])
    if isinstance(value, int) and value < SMALLEST_MEMORY_LIMIT:
        raise ValueError("must be at least 1MiB")
    return value


def _microbatch(value: object) -> object:
    if value in (None, "auto", "fastest"):
        return None if value == "auto" else value
    if isinstance(value, str) and not value.strip().isdecimal():
        raise ValueError("must be a whole number, auto or fastest")
    return _number(value)


def _storage(value: object) -> object:
    """A plain path to a database is taken for SQLite."""
    if isinstance(value, str) and "://" not in value and value.endswith((".db", ".sqlite3")):
        return f"sqlite:///{_file_name(value)}"
    return value


def _file_name(value: object) -> object:
    """Refuses what a URL would take for something else than a part of a file's name."""
    if isinstance(value, str) and set(value) & set("?%#"):
        raise ValueError("must be without ?, % and #, which mean something else in a URL")
    return value


def _given(value: object) -> object:
    """Refuses what an unset variable of a shell leaves."""
    if isinstance(value, str) and not value.strip():
        raise ValueError("must not be empty; leave it out for the default")
    return value


Whole = Annotated[int, BeforeValidator(_number)]


class StudyConfig(BaseModel):
    """The settings of one study; the descriptions are the help of the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str = Field("digits", description="built-in (digits, text), FILE.py or MODULE:NAME")
    study: Annotated[str | None, BeforeValidator(_file_name), BeforeValidator(_given)] = Field(
        None, description="name of the study (default: that of the task)"
    )
    storage: Annotated[str | None, BeforeValidator(_storage), BeforeValidator(_given)] = Field(
        None,
        description="storage URL, or an SQLite file; its folder is made if no more than that is "
        "missing (default: sqlite:///studies/STUDY.db)",
    )
    trials: Whole = Field(
        30,
        ge=0,
        description="trials in all; more if they are done already; 0 trains nothing and says what "
        "was found",
    )
    timeout: Annotated[float | None, BeforeValidator(_number)] = Field(
        None, gt=0, allow_inf_nan=False, description="start no trial after so many seconds"
    )
    batch_size: Annotated[tuple[int, int], BeforeValidator(_batch_sizes)] = Field(
        (16, 512),
        description="batch sizes to search, LOW:HIGH, or the only one (default: 16:512, or less "
        "where there are fewer training samples)",
    )
    lr: Annotated[tuple[float, float] | None, BeforeValidator(_learning_rates)] = Field(
        None,
        description="learning rates to search, LOW:HIGH, or the only one (default: 1e-5:1e-1, SGD "
        "1e-4:1)",
    )
    reference: Annotated[tuple[int, float] | None, BeforeValidator(_reference)] = Field(
        None,
        description="a setting known to work, BATCH_SIZE:LEARNING_RATE; where to begin, carried by "
        "the scaling law to the nearest batch size that is searched",
    )
    optimizer: Literal["adamw", "sgd"] | None = Field(
        None, description="adamw or sgd (default: the task's)"
    )
    budget: Annotated[str | None, BeforeValidator(_budget)] = Field(
        None,
        description="what every trial gets: samples=N, steps=N or seconds=N (default: the "
        "samples of 8 passes over the training data)",
    )
    microbatch_size: Annotated[
        Annotated[int, Field(ge=1)] | Literal["fastest"] | None, BeforeValidator(_microbatch)
    ] = Field(
        None,
        description="largest microbatch; fastest measures which is the smallest at full speed "
        "(default: auto, whatever fits)",
    )
    memory_limit: Annotated[int | None, BeforeValidator(parse_bytes)] = Field(
        None, description="memory that training may hold, as in 512MiB (default: the device's)"
    )
    oom_budget: Annotated[float, BeforeValidator(_number)] = Field(
        0.5, ge=0, le=1, description="part of a trial's time that may be lost to memory"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, mps, ...")
    seed: Whole = Field(0, ge=0, le=2**32 - 1, description="of sampler, weights and data order")
    final_runs: Whole = Field(
        3, ge=0, description="trainings of the recommended setting with seeds of their own"
    )

    isolate: bool = Field(
        False,
        description="run trials in a worker process, whose sudden death costs one attempt of a "
        "trial and not the study",
    )
    workers: Annotated[int | None, BeforeValidator(_number)] = Field(
        None, ge=1, description="run trials in so many worker processes at a time (default: none)"
    )

    @property
    def worker_processes(self) -> int:
        """Worker processes that trials run in; 0 if they run in this one."""
        return self.workers or int(self.isolate)

    def for_samples(self, samples: int) -> StudyConfig:
        """With no larger batches than there are samples, where none were asked for."""
        if "batch_size" in self.model_fields_set:
            return self
        low, high = self.batch_size
        return self.model_copy(update={"batch_size": (min(low, samples), min(high, samples))})

    def as_toml(self) -> str:
        """All settings that are not None, as a file that can be given back."""
        lines = []
        for name, value in self.model_dump().items():
            if value is not None:
                text = ":".join(map(str, value)) if isinstance(value, tuple) else value
                lines.append(f"{name} = {json.dumps(text, ensure_ascii=False)}")
        return "\n".join(lines)


def make_config(path: Path | None, flags: Mapping[str, object]) -> StudyConfig:
    """The settings of the file, with those of the flags in their place.

    Args:
        path: A TOML file, or None.
        flags: What was said on the command line, by name of the setting.

    Raises:
        ConfigError: The file cannot be read, or a setting is unknown, of the wrong type or out of
            bounds.
    """
    settings = {} if path is None else _read(path)
    try:
        return StudyConfig.model_validate({**settings, **flags})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        where = f"{path}: " if path is not None and name not in flags else ""
        raise ConfigError(where + _sentence(name, first)) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a TOML file that exists.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no valid TOML: {error}.") from None


def _sentence(name: str, error: Any) -> str:
    """One line that names the setting, its value, the bound and what would be right."""
    known = list(StudyConfig.model_fields)
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, known, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}."
        return f"unknown setting {name!r}; {remedy}"
    message = str(error["ctx"]["error"]) if error["type"] == "value_error" else error["msg"]
    if message.startswith(f"{name}="):
        return message
    value = (
        error["input"]
        if isinstance(error["input"], str)
        else json.dumps(error["input"], default=str)
    )
    if error["type"] in ("int_parsing", "int_type", "int_from_float"):
        message = "must be a whole number"
    message = message.replace("Input should be", "must be").replace(", unable to parse", "; not")
    return f"{name}={value}; {message.rstrip('.')}."

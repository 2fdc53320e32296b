"""What counts as out of memory, and how to let go of the attempt that met it.

Everything is imported and compiled when this module loads: while memory is short, an import inside
a handler fails with an error of its own.
"""

from __future__ import annotations

import errno
import gc
import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace

import torch

from bs_optuna.errors import MicrobatchDoesNotFitError
from bs_optuna.errors import StepDoesNotFitError


# The kind of what a smaller microbatch cannot help: its single sample, which BatchNorm refuses.
BATCH_NORM = "batch normalization"


@dataclass(frozen=True)
class OutOfMemory:
    """The verdict on an error that means "not enough memory".

    Attributes:
        kind: Whose memory was short: "cuda", "hip", "xpu", "mps", "cpu", "shared memory", or
            "device" where the error does not say.
        bytes_requested: Size in bytes of the allocation that failed, where the error says it; as
            exact as the message, which may be rounded ("2.00 GiB").
        retryable: Whether a smaller microbatch can succeed in this process. False where the
            failure leaves the device, the communicator or the thread unusable, and where the
            memory does not depend on the microbatch.
        message: The line of the error that says so.
    """

    kind: str
    bytes_requested: int | None
    retryable: bool
    message: str


@dataclass(frozen=True)
class _Text:
    """A text that C++ code raises as a plain RuntimeError."""

    kind: str
    pattern: re.Pattern[str]
    retryable: bool = True


# The first that matches decides. Each is as long as it takes to leave out what people write
# themselves ("ran out of memory.") and what other resources run out of (files, disk, registers).
_TEXTS = (
    _Text("cuda", re.compile(r"CUDA out of memory\.")),
    # A communicator whose buffers could not be allocated cannot be used again.
    _Text("cuda", re.compile(r"Cuda failure (?:\d+ )?'out of memory'"), retryable=False),
    _Text("cuda", re.compile(r"(?:CUDA (?:driver )?error|Triton Error \[CUDA\]): out of memory")),
    _Text("cuda", re.compile(r"\bCU(?:BLAS|SPARSE|SOLVER)_STATUS_ALLOC_FAILED\b")),
    _Text("cuda", re.compile(r"\bCUFFT_ALLOC_FAILED\b")),
    _Text("cuda", re.compile(r"\bCUDNN_STATUS_(?:\w*(?:DEVICE|HOST)_ALLOCATION|ALLOC)_FAILED\b")),
    # Its handle takes memory that is not PyTorch's. So says a lost device too; the next try tells.
    _Text("cuda", re.compile(r"\bCUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate")),
    # On a partitioned GPU (MIG) and on Jetson the allocator asks NVML how much is left, for the
    # text of its error, and dies of that.
    _Text("cuda", re.compile(r"NVML_SUCCESS == .+ INTERNAL ASSERT FAILED")),
    _Text("hip", re.compile(r"HIP out of memory\.|HIP error: out of memory")),
    _Text("hip", re.compile(r"\bHIPBLAS_STATUS_ALLOC_FAILED\b")),
    _Text("xpu", re.compile(r"XPU out of memory\.")),
    # Comes from the driver, below PyTorch's allocator, and the queue is lost.
    _Text("xpu", re.compile(r"\bUR_RESULT_ERROR_OUT_OF_(?:DEVICE|HOST)_MEMORY\b"), retryable=False),
    _Text("mps", re.compile(r"MPS backend out of memory|^Invalid buffer size: [\d.]+ [KMGT]i?B")),
    _Text("cpu", re.compile(r"DefaultCPUAllocator: (?:can't allocate|not enough) memory")),
    _Text("cpu", re.compile(r"posix_memalign failed:\s*Cannot allocate memory")),
    _Text("cpu", re.compile(r"\bstd::bad_alloc\b")),
    # Once oneDNN failed to build a primitive, that thread goes on failing with plenty of memory.
    _Text("cpu", re.compile(r"^could not create a primitive"), retryable=False),
    _Text("shared memory", re.compile(r"unable to allocate shared memory\(shm\)"), retryable=False),
    _Text(
        "shared memory",
        re.compile(r"unable to mmap \d+ bytes from file .*: Cannot allocate memory"),
        retryable=False,
    ),
    _Text(
        "shared memory",
        re.compile(r"dataloader's workers are out of shared memory"),
        retryable=False,
    ),
)

# cuDNN's algorithms are tried in turn, and that memory ran out for one is not handed on.
_NO_ENGINE = re.compile(
    r"(?:GET|FIND) was unable to find an engine|Unable to find a valid cuDNN algorithm"
)

# After these the device answers nothing but errors, whatever was raised before.
_POISONED = re.compile(
    r"illegal memory access|device-side assert|unspecified launch failure|misaligned address"
    r"|illegal instruction|uncorrectable (?:NVLink|ECC) error|DEVICE_LOST"
)

_BYTES = re.compile(
    r"(?:Tried to allocate|tried to allocate|Unable to allocate|Invalid buffer size:|to mmap)"
    r" ([\d.]+) (bytes|[KMGTPE]i?B)"
)
# PyTorch and NumPy count in powers of 1024, whichever way they spell the unit.
_UNITS = {"b": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50, "E": 2**60}


_refused = 0  # times that CUDA's allocator had when somebody last asked


def classify(error: BaseException) -> OutOfMemory | None:
    """Says whether an error means that memory ran out.

    The error's own type and text come first. Then what it was raised from: an error raised
    explicitly (`raise ... from oom`) counts as its cause. One that was merely raised *while* an
    out of memory was handled counts only if it is a plain RuntimeError, which is what a clean-up
    on a device without memory raises; a ValueError there is a mistake in the handler, and a
    `TrialPruned` there is somebody's decision, so neither is retried. A group counts if all of
    its errors do.

    Args:
        error: Any error.

    Returns:
        The verdict, or None where the error means something else.
    """
    try:
        return _classify(error)
    except MemoryError:
        # Not even the message can be read while the failed attempt holds all there is.
        release(error)
        return _classify(error)


def _classify(error: BaseException) -> OutOfMemory | None:
    found = _find(error, frozenset())
    if found is not None:
        _has_refused()  # what was refused until now has been seen
    if found is not None and found.retryable and any(map(_is_poisoned, _chain(error))):
        return replace(found, retryable=False)
    return found


def release(error: BaseException) -> None:
    """Lets go of the tensors that a failed attempt still holds through its traceback.

    Call it after the `except` block was left: a frame that is still being executed, such as the
    one that handles the error, cannot be cleared.

    Args:
        error: The error that ended the attempt. It, and all it was raised from, keep their type
            and message and lose their traceback.
    """
    handled = sys.exception()
    met = [] if handled is None else [*_chain(handled)]
    # One that was being handled before the attempt began is not ours.
    others = set() if any(member is error for member in met) else set(map(id, met))
    for member in _chain(error):
        if id(member) not in others:
            traceback.clear_frames(member.__traceback__)
            member.__traceback__ = None


def empty_caches() -> None:
    """Gives unused memory back: Python's cycles, then the caches of the devices in use."""
    gc.collect()
    torch.cuda.empty_cache()  # this one and XPU's do nothing unless the device was initialised
    torch.xpu.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def _find(error: BaseException | None, seen: frozenset[int]) -> OutOfMemory | None:
    """Classifies an error without regard to poisoned devices elsewhere in its chain."""
    if not isinstance(error, Exception) or id(error) in seen or _is_poisoned(error):
        return None
    seen |= {id(error)}
    own = _find_in_group(error, seen) if isinstance(error, ExceptionGroup) else _find_own(error)
    if own is not None:
        return own
    inner = getattr(error, "inner_exception", None)  # of what failed in torch.compile
    cause = inner if isinstance(inner, BaseException) else error.__cause__
    if cause is not None:
        return _find(cause, seen)
    if type(error) is RuntimeError and not error.__suppress_context__:
        return _find(error.__context__, seen)
    return None


def _find_in_group(group: ExceptionGroup[Exception], seen: frozenset[int]) -> OutOfMemory | None:
    members = [_find(member, seen) for member in group.exceptions]
    verdicts = [verdict for verdict in members if verdict is not None]
    if len(verdicts) < len(members):
        return None
    sizes = [v.bytes_requested for v in verdicts if v.bytes_requested is not None]
    return replace(
        verdicts[0],
        bytes_requested=max(sizes, default=None),
        retryable=all(verdict.retryable for verdict in verdicts),
    )


def _find_own(error: Exception) -> OutOfMemory | None:
    """Judges by type and text alone."""
    if isinstance(error, MicrobatchDoesNotFitError | StepDoesNotFitError):
        return OutOfMemory("device", error.bytes_requested, False, _first_line(error))
    if isinstance(error, RuntimeError):
        text = str(error)
        for known in _TEXTS:
            for line in text.splitlines():
                if known.pattern.search(line):
                    return OutOfMemory(known.kind, _parse_bytes(line), known.retryable, line)
        if _NO_ENGINE.search(text) and _has_refused():
            return OutOfMemory("cuda", None, True, _first_line(error))
    if isinstance(error, torch.OutOfMemoryError):
        return OutOfMemory("device", _parse_bytes(str(error)), True, _first_line(error))
    if isinstance(error, MemoryError):
        return OutOfMemory("cpu", _parse_bytes(str(error)), True, _first_line(error))
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return OutOfMemory("cpu", None, True, _first_line(error))
    return None


def _has_refused() -> bool:
    """Whether CUDA's allocator has refused memory since this was last asked."""
    global _refused
    before, _refused = _refused, _refusals()
    return _refused > before


def _refusals() -> int:
    if not torch.cuda.is_initialized():
        return 0
    devices = range(torch.cuda.device_count())
    return sum(torch.cuda.memory_stats(device).get("num_ooms", 0) for device in devices)


def _is_poisoned(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and _POISONED.search(str(error)) is not None


def _parse_bytes(text: str) -> int | None:
    found = _BYTES.search(text)
    return round(float(found[1]) * _UNITS[found[2][0]]) if found else None


def _first_line(error: BaseException) -> str:
    """The first line of the message; `MemoryError()` has none and is named by its type."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yields an error and everything it was raised from or holds, each once."""
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        member = waiting.pop()
        if member is None or id(member) in seen:
            continue
        seen.add(id(member))
        yield member
        waiting += [member.__cause__, member.__context__]
        if isinstance(member, BaseExceptionGroup):
            waiting += member.exceptions


def does_not_fit(verdict: OutOfMemory, tried: list[int], setting: str) -> MicrobatchDoesNotFitError:
    """The error for a single sample that does not fit.

    Args:
        verdict: On the last attempt.
        tried: What the largest microbatch of each attempt held.
        setting: The name of what limits a microbatch.
    """
    if verdict.kind == BATCH_NORM:
        after = f" after {', '.join(map(str, tried[:-1]))} ran out of memory" if tried[1:] else ""
        return MicrobatchDoesNotFitError(
            f"BatchNorm cannot take the single sample that {setting}={tried[-1]} leaves by itself"
            f"{after}; use convert_batch_norm(model), a larger {setting}, or more memory.",
            sizes_tried=tried,
            sizes_failed=tried[:-1],
            bytes_requested=None,
        )
    asked = "" if verdict.bytes_requested is None else f" {verdict.bytes_requested:,} bytes more,"
    if verdict.retryable:
        remedy = "use a smaller model or shorter samples, or give the training more memory"
    else:
        remedy = "the device is unusable after this failure: start the process anew"
    return MicrobatchDoesNotFitError(
        f"Out of memory ({verdict.kind}) with {setting}={tried[-1]},{asked} "
        f"after trying {', '.join(map(str, tried))}; {remedy}.",
        sizes_tried=tried,
        bytes_requested=verdict.bytes_requested,
    )

"""Out of memory is recognised by what real systems say."""

from __future__ import annotations

import errno
import inspect
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from bs_optuna.errors import MicrobatchDoesNotFitError
from bs_optuna.training import oom
from bs_optuna.training.oom import OutOfMemory
from bs_optuna.training.oom import classify
from bs_optuna.training.oom import release


GIB = 2**30

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of "
    "which 1.02 GiB is free. Process 1 has 78.12 GiB memory in use."
)
HIP = (
    "HIP out of memory. Tried to allocate 3.31 GiB. GPU 0 has a total capacity of 128.00 GiB of "
    "which 780.24 MiB is free."
)
XPU = "XPU out of memory. Tried to allocate 512 bytes. GPU 0 has a total capacity of 5.65 GiB."
MPS = (
    "MPS backend out of memory (MPS allocated: 17.99 GB, other allocations: 122.12 MB, max "
    "allowed: 18.13 GB). Tried to allocate 64.00 MB on private pool. Use "
    "PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit for memory allocations."
)
LINUX = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 419430400 bytes. Error code 12 (Cannot allocate memory)"
)
WINDOWS = (
    "[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried "
    "to allocate 7500000000 bytes."
)
MIG = (
    'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":1154, '
    "please report a bug to PyTorch. "
)
JETSON = (
    "NVML_SUCCESS == DriverAPI::get()->nvmlDeviceGetHandleByPciBusId_v2_( pci_id, &nvml_device) "
    'INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":1123, please report a bug'
)
NO_ENGINE = "GET was unable to find an engine to execute this computation"
NCCL = (
    "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:275, unhandled cuda error, NCCL "
    "version 2.20.5\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
    "Cuda failure 2 'out of memory'"
)
ILLEGAL = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be"
WORKER = (
    "Caught OutOfMemoryError in replica 1 on device 1.\nOriginal Traceback (most recent call "
    f'last):\n  File "parallel_apply.py", line 96, in _worker\ntorch.OutOfMemoryError: {CUDA}\n'
)


def numpy_error() -> BaseException:
    with pytest.raises(MemoryError) as caught:
        np.empty((10**7, 10**6))
    return caught.value


def python_error() -> BaseException:
    with pytest.raises(MemoryError) as caught:
        bytearray(2**62)
    return caught.value


def torch_error() -> BaseException:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    return caught.value


def compiling() -> BaseException:
    """What comes of an error while ``torch.compile`` compiles: without context, but held."""
    return BackendCompilerFailed(lambda graph: graph, MemoryError(), inspect.currentframe())


def raised_from(error: BaseException, cause: BaseException) -> BaseException:
    """`raise error from cause`, as Python does it."""
    with pytest.raises(type(error)) as caught:
        raise error from cause
    return caught.value


def raised_while(error: BaseException, handled: BaseException) -> BaseException:
    """An error raised in the handler of another one."""
    try:
        try:
            raise handled
        except type(handled):
            raise error  # noqa: B904 - the implicit chain is the point
    except type(error) as caught:
        return caught


def raised_instead(error: BaseException, handled: BaseException) -> BaseException:
    """`raise error from None` in the handler of another one."""
    try:
        try:
            raise handled
        except type(handled):
            raise error from None
    except type(error) as caught:
        return caught


POSITIVES: list[tuple[BaseException | Callable[[], BaseException], str, int | None, bool]] = [
    (torch.OutOfMemoryError(CUDA), "cuda", 2 * GIB, True),
    (torch.OutOfMemoryError(WORKER), "cuda", 2 * GIB, True),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "cuda", None, True),
    (RuntimeError("CUDA driver error: out of memory"), "cuda", None, True),
    (RuntimeError("Triton Error [CUDA]: out of memory"), "cuda", None, True),
    (RuntimeError(NCCL), "cuda", None, False),
    (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        "cuda",
        None,
        True,
    ),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "cuda", None, True),
    (
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        "cuda",
        None,
        True,
    ),
    (
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
        "cuda",
        None,
        True,
    ),
    (
        RuntimeError(
            "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
        ),
        "cuda",
        None,
        True,
    ),
    (RuntimeError(MIG), "cuda", None, True),
    (RuntimeError(JETSON), "cuda", None, True),
    (torch.OutOfMemoryError(HIP), "hip", round(3.31 * GIB), True),
    (RuntimeError("HIP error: out of memory"), "hip", None, True),
    (torch.OutOfMemoryError(XPU), "xpu", 512, True),
    (
        RuntimeError(
            "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"
        ),
        "xpu",
        None,
        False,
    ),
    (RuntimeError(MPS), "mps", 64 * 2**20, True),
    (RuntimeError("Invalid buffer size: 24.00 GiB"), "mps", 24 * GIB, True),
    (RuntimeError(LINUX), "cpu", 419430400, True),
    (RuntimeError(WINDOWS), "cpu", 7500000000, True),
    (RuntimeError("std::bad_alloc"), "cpu", None, True),
    (RuntimeError("posix_memalign failed:Cannot allocate memory (12)"), "cpu", None, True),
    (RuntimeError("could not create a primitive"), "cpu", None, False),
    (
        RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_8_1>: Resource temporarily "
            "unavailable (11)"
        ),
        "shared memory",
        None,
        False,
    ),
    (
        RuntimeError(
            "unable to mmap 29764 bytes from file </torch_1_2_3>: Cannot allocate memory (12)"
        ),
        "shared memory",
        29764,
        False,
    ),
    (
        RuntimeError(
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
            "dataloader's workers are out of shared memory. Please try to raise your shared "
            "memory limit."
        ),
        "shared memory",
        None,
        False,
    ),
    (compiling, "cpu", None, True),
    (MemoryError(), "cpu", None, True),
    (python_error, "cpu", None, True),
    (numpy_error, "cpu", round(72.8 * 2**40), True),
    (torch_error, "cpu", 2**50, True),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "cpu", None, True),
    (torch.OutOfMemoryError("Allocation on device"), "device", None, True),
    (
        MicrobatchDoesNotFitError("one sample", sizes_tried=[2, 1], bytes_requested=5),
        "device",
        5,
        False,
    ),
    (
        lambda: raised_from(ValueError("forward failed"), RuntimeError(LINUX)),
        "cpu",
        419430400,
        True,
    ),
    (
        lambda: raised_while(RuntimeError("sync failed"), RuntimeError(LINUX)),
        "cpu",
        419430400,
        True,
    ),
    (
        lambda: raised_while(RuntimeError(MPS), RuntimeError(ILLEGAL)),
        "mps",
        64 * 2**20,
        False,
    ),
    (
        ExceptionGroup("workers", [RuntimeError(LINUX), torch.OutOfMemoryError(CUDA)]),
        "cpu",
        2 * GIB,
        True,
    ),
    (
        ExceptionGroup("workers", [MemoryError(), ExceptionGroup("deep", [RuntimeError(NCCL)])]),
        "cpu",
        None,
        False,
    ),
]


@pytest.mark.parametrize(("error", "kind", "bytes_requested", "retryable"), POSITIVES)
def test_out_of_memory_is_recognised(
    error: BaseException | Callable[[], BaseException],
    kind: str,
    bytes_requested: int | None,
    retryable: bool,
) -> None:
    error = error if isinstance(error, BaseException) else error()

    verdict = classify(error)

    assert isinstance(verdict, OutOfMemory)
    assert (verdict.kind, verdict.retryable) == (kind, retryable)
    assert verdict.bytes_requested == bytes_requested
    assert verdict.message
    assert "\n" not in verdict.message


LOOK_ALIKES: list[BaseException | Callable[[], BaseException]] = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (8x3 and 4x5)"),
    RuntimeError("ran out of memory."),
    RuntimeError("The parser ran out of memory."),
    ValueError(CUDA),
    AssertionError("expected: CUDA out of memory."),
    RuntimeError(ILLEGAL),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: unspecified launch failure"),
    RuntimeError("CUDA error: too many resources requested for launch"),
    RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."),
    RuntimeError(NO_ENGINE),
    RuntimeError(NCCL.replace("2 'out of memory'", "1 'invalid argument'")),
    RuntimeError(
        "unable to open shared memory object </torch_1> in read-write mode: "
        "Too many open files (24)"
    ),
    RuntimeError("unable to write to file </torch_1>: No space left on device (28)"),
    RuntimeError(
        "alloc_cpu() seems to have been called with negative number: 18446744073709551615"
    ),
    RuntimeError("Storage size calculation overflowed with sizes=[4611686018427387904, 4]"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EMFILE, "Too many open files"),
    KeyError("exp_avg_sq"),
    KeyboardInterrupt(),
    lambda: raised_while(ValueError("a bug in the handler"), RuntimeError(LINUX)),
    lambda: raised_while(KeyError("exp_avg_sq"), torch.OutOfMemoryError(CUDA)),
    lambda: raised_instead(RuntimeError("given up"), RuntimeError(LINUX)),
    lambda: raised_from(KeyboardInterrupt(), RuntimeError(LINUX)),
    lambda: raised_while(RuntimeError(ILLEGAL), torch.OutOfMemoryError(CUDA)),
    lambda: raised_from(RuntimeError("forward failed"), RuntimeError("shapes")),
    ExceptionGroup("workers", [RuntimeError(LINUX), RuntimeError("shape mismatch")]),
    BaseExceptionGroup("workers", [RuntimeError(LINUX), KeyboardInterrupt()]),
]


@pytest.mark.parametrize("error", LOOK_ALIKES)
def test_look_alikes_are_not_out_of_memory(
    error: BaseException | Callable[[], BaseException],
) -> None:
    assert classify(error if isinstance(error, BaseException) else error()) is None


def test_an_engine_that_is_not_found_means_memory_if_the_allocator_has_refused_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refusals = 0
    monkeypatch.setattr(oom, "_refusals", lambda: refusals)
    classify(MemoryError())  # which has seen all until now
    assert classify(RuntimeError(NO_ENGINE)) is None
    refusals = 3
    verdict = classify(RuntimeError(NO_ENGINE))
    assert verdict is not None
    assert (verdict.kind, verdict.retryable) == ("cuda", True)
    assert classify(RuntimeError(NO_ENGINE)) is None  # none since then
    refusals = 4
    assert classify(torch.OutOfMemoryError(CUDA)) is not None
    assert classify(RuntimeError(NO_ENGINE)) is None  # that one was seen


def test_an_error_that_is_its_own_cause_is_classified_all_the_same() -> None:
    first, second = RuntimeError("first"), RuntimeError("second")
    first.__cause__, second.__cause__ = second, first

    assert classify(first) is None
    release(first)


class TooFull(RuntimeError):
    """Its message takes memory, which its traceback holds."""

    def __str__(self) -> str:
        if self.__traceback__ is not None:
            raise MemoryError
        return CUDA


def test_a_message_that_takes_memory_is_read_while_the_error_is_handled() -> None:
    try:
        raise TooFull
    except TooFull as error:
        verdict = classify(error)
    assert verdict is not None
    assert verdict.bytes_requested == 2 * GIB

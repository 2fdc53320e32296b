"""How an optimizer's step ended: the error to raise for it, and what a rank tells the others."""

from __future__ import annotations

from bs_optuna.errors import RanksError
from bs_optuna.errors import StepDoesNotFitError
from bs_optuna.training.oom import OutOfMemory


# Of several ranks the greatest counts. All can undo a step where one has not begun it, but not
# where each that failed has stepped some of its groups.
DONE, PARTLY, DOES_NOT_FIT, ERROR = 0.0, 1.0, 2.0, 3.0


def does_not_fit(what: str, verdict: OutOfMemory, *, stepped: str = "") -> StepDoesNotFitError:
    """The error for a step that does not fit.

    Args:
        what: Ran out of memory.
        verdict: On the last attempt.
        stepped: What has been stepped nevertheless, if something has.
    """
    asked = "" if verdict.bytes_requested is None else f", {verdict.bytes_requested:,} bytes more"
    if verdict.retryable:
        remedy = "use a smaller model, a fused optimizer or one with less state, or more memory"
    else:
        remedy = "the device is unusable after this failure: start the process anew"
    if stepped:
        remedy = f"{stepped} had been stepped and stay so: load your last checkpoint; {remedy}"
    return StepDoesNotFitError(
        f"Out of memory ({verdict.kind}) in {what}{asked}; {remedy}.",
        bytes_requested=verdict.bytes_requested,
        partly=bool(stepped),
    )


def report(failed: BaseException | None) -> tuple[float, float]:
    """What a rank tells the others: how its step ended, and the bytes that were missing."""
    if failed is None:
        return DONE, -1.0
    if isinstance(failed, StepDoesNotFitError):
        asked = -1.0 if failed.bytes_requested is None else failed.bytes_requested
        return PARTLY if failed.partly else DOES_NOT_FIT, asked
    return ERROR, -1.0


def elsewhere(rank: int, outcome: float, asked: float) -> Exception:
    """The error for a step that has failed on another rank."""
    if outcome in (PARTLY, DOES_NOT_FIT):
        verdict = OutOfMemory(f"rank {rank}", None if asked < 0 else int(asked), True, "")
        stepped = "some groups" if outcome == PARTLY else ""
        return does_not_fit("its step", verdict, stepped=stepped)
    return RanksError(
        f"Rank {rank} failed in its step with an error of its own, which it raises, and this rank "
        "has stepped: they may differ by now. Mend that error and start all ranks again."
    )

"""The summary of a study: what to use, how well it does, how sure that is, what was compared."""

from __future__ import annotations

import math
import shlex
import statistics
import textwrap
from collections import Counter
from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
from rich.console import Group
from rich.console import RenderableType
from rich.text import Text

from bs_optuna.sampling import attributes
from bs_optuna.sampling.feasibility import is_out_of_memory
from bs_optuna.sampling.recommendation import Recommendation
from bs_optuna.study.conclusion import Conclusion
from bs_optuna.study.tuning import Tuning
from bs_optuna.training.budget import Budget


INDENT = 23
LINE_WIDTH = 98
# The noise of a single run shows in trials with nearly the same setting. Below so many complete
# ones within this factor of the recommendation, the model has only assumed how large it is.
NEAR = 3
NEAR_TRIALS = 5
NOTICEABLE = 1.25
FAR = 3  # times the noise scale, or a part of it; it tells the critical batch size no better
# What a budget can and cannot tell (Godbole et al., Deep Learning Tuning Playbook).
_CAVEATS = {
    "samples": "equal samples favour small batches; for the fastest training compare seconds",
    "steps": "equal steps favour large batches, which see more samples",
    "seconds": "equal seconds on this machine; another one may prefer another batch size",
}


def summary(
    tuning: Tuning, conclusion: Conclusion | None, *, width: int = LINE_WIDTH
) -> RenderableType:
    """The summary, ready to be printed on lines of at most ``width`` characters."""
    width = min(width, LINE_WIDTH)
    parts: list[RenderableType] = []
    if conclusion is None:
        parts.append(Text("No trial was completed, so there is nothing to recommend.", "bold red"))
    for title, rows in tables(tuning, conclusion).items():
        parts += [Text(f"\n{title}", "bold"), _table(rows, width)]
    parts.append(Text("\nOpen the study"))
    parts.append(
        Text(f"  optuna-dashboard {shlex.quote(tuning.storage)}", "bold cyan", no_wrap=True)
    )
    return Group(*parts)


def tables(tuning: Tuning, conclusion: Conclusion | None) -> dict[str, list[tuple[str, str]]]:
    """Names and values of the summary's tables, by the title of each."""
    evidence = {"Evidence": _evidence_rows(tuning, conclusion)}
    if conclusion is None:
        return evidence
    rows = _setting_rows(tuning, conclusion) + _score_rows(tuning, conclusion)
    return {f"Recommended for {tuning.task.name}": rows, **evidence}


def _table(rows: Sequence[tuple[str, str]], width: int) -> Text:
    """Names and values in two columns; no wider than the text of a book, and without a tail."""
    table = Text()
    indent = max(INDENT, max(len(name) for name, _ in rows) + 4)
    for name, value in rows:
        start = len(table)
        lines = textwrap.wrap(
            value,
            width,
            initial_indent=f"  {name}".ljust(indent),
            subsequent_indent=" " * indent,
        )
        table.append("\n".join(lines) + "\n")
        table.stylize("dim", start, start + len(name) + 2)
    table.right_crop(1)
    return table


def _setting_rows(tuning: Tuning, conclusion: Conclusion) -> list[tuple[str, str]]:
    rate = f"{conclusion.learning_rate:.3g}"
    if conclusion.evidence is not None:
        low, high = conclusion.evidence.learning_rate_interval
        rate += f"   (the best one: {low:.2g} to {high:.2g}, with 90 % probability)"
    return [
        ("batch size", str(conclusion.batch_size)),
        ("learning rate", rate),
        ("warmup", _warmup(tuning.objective.budget, conclusion)),
        ("microbatch size", _microbatch(tuning, conclusion.microbatch_size)),
        ("accumulation steps", str(conclusion.accumulation_steps)),
    ]


def _microbatch(tuning: Tuning, size: int) -> str:
    if (longest := tuning.task.longest) is None:
        return str(size)
    return f"{size} of the longest samples, or shorter ones with {size * longest:,} elements in all"


def _warmup(budget: Budget, conclusion: Conclusion) -> str:
    total = budget.steps(conclusion.batch_size)
    if total is None:
        return f"first {conclusion.warmup:.0%} of the run"
    return f"{round(conclusion.warmup * total)} of {total} steps"


def _score_rows(tuning: Tuning, conclusion: Conclusion) -> list[tuple[str, str]]:
    rows = [
        (f"{title} {name}", _score(values))
        for title, scores in (("validation", conclusion.valid), ("test", conclusion.test))
        for name, values in scores.items()
    ]
    if conclusion.failed:
        rows.append(("warning", f"{conclusion.failed} final runs diverged or did not fit"))
    if tuning.task.test_data is None:
        rows.append(("test", "the task has no test data"))
    return rows


def _score(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.4g}"
    if len(values) < 2:
        return f"{mean}   (one run)"
    spread = statistics.stdev(values)
    shown = f"{spread:.2g}" if spread > 1e-6 else "0"  # below that it is what rounding left
    return f"{mean} ± {shown}   ({len(values)} runs with new seeds)"


def _evidence_rows(tuning: Tuning, conclusion: Conclusion | None) -> list[tuple[str, str]]:
    budget = tuning.objective.budget
    rows = [("compared at", f"{budget}: {_CAVEATS[budget.unit]}")]
    if conclusion is not None and conclusion.evidence is not None:
        evidence = conclusion.evidence
        low, high = evidence.value_interval
        rows.append(("best of those tried", _chance(tuning.study, conclusion, evidence)))
        rows.append(
            (
                f"expected {tuning.task.objective}",
                f"{evidence.value:.4g} ({low:.4g} to {high:.4g})",
            )
        )
    elif conclusion is not None:
        rows.append(("best of those tried", "not known: too few trials were completed; run more"))
    if conclusion is not None and conclusion.noise_scales:
        rows.append(("gradient noise", _noise(conclusion)))
    rows.append(("trials", _counts(tuning.study)))
    notes = _too_large(tuning.study)
    if conclusion is not None:
        notes += _broken_promise(tuning, conclusion)
        notes += _luckiest(tuning.study, conclusion) + _edges(tuning, conclusion)
    return rows + [("note", note) for note in notes]


def _chance(study: optuna.Study, conclusion: Conclusion, evidence: Recommendation) -> str:
    """How likely no other setting tried is better, where trials nearby have shown the noise."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    near = sum(_distance(trial, conclusion) <= NEAR for trial in complete)
    if near < NEAR_TRIALS:
        return (
            f"not known: it takes {NEAR_TRIALS} complete trials within a factor of {NEAR} of this "
            f"setting, and has {near}; run more"
        )
    assert evidence.probability_best is not None  # the setting was tried
    return (
        f"{percent(evidence.probability_best)} likely that no other setting tried is better, by "
        "however little; near ties share the rest"
    )


def _noise(conclusion: Conclusion) -> str:
    """The noise scale over the training, a guide to the critical batch size, and a verdict."""
    scales, batch_size = conclusion.noise_scales, conclusion.batch_size
    told = [f"{_rounded(scale)} at {k} %" for k, scale in scales.items() if scale is not None]
    untold = [part for part, scale in scales.items() if scale is None]
    if untold:
        samples = f"{conclusion.noise_samples:,}"
        told.append(f"more than {samples} samples tell at {', '.join(untold)} %")
    middle = statistics.median(math.inf if scale is None else scale for scale in scales.values())
    if batch_size * FAR < middle:
        verdict = "far below it: larger ones need fewer steps, for few samples more"
    elif batch_size > middle * FAR:
        verdict = "far above it: smaller ones need fewer samples, for few steps more"
    else:
        verdict = "near it: larger ones save less and less"
    return (
        f"its scale is {', '.join(told)} of the training; a batch of {batch_size} is {verdict} "
        f"(a guide within {FAR}x)"
    )


def _rounded(number: float) -> str:
    return f"{max(1.0, float(f'{number:.2g}')):,.0f}"


def percent(chance: float) -> str:
    """A chance as a person would say it: of a few thousand draws none at all proves little."""
    if chance < 0.01:
        return "less than 1%"
    return f"{chance:.0%}" if chance <= 0.99 else "more than 99%"


def _distance(trial: FrozenTrial, conclusion: Conclusion) -> float:
    """Factor between a trial's setting and the recommended one, the larger of the two."""
    batch_sizes = trial.params["batch_size"] / conclusion.batch_size
    rates = trial.params["lr"] / conclusion.learning_rate
    return float(max(batch_sizes, 1 / batch_sizes, rates, 1 / rates))


def _broken_promise(tuning: Tuning, conclusion: Conclusion) -> list[str]:
    """What to do where every new seed ends far worse than the trials let expect."""
    name, evidence = tuning.task.objective, conclusion.evidence
    found = conclusion.valid.get(name, [])
    if evidence is None or len(found) < 2:
        return []
    low, high = evidence.value_interval
    if tuning.study.direction == optuna.study.StudyDirection.MAXIMIZE:
        broken = max(found) < low - (high - low)
    else:
        broken = min(found) > high + (high - low)
    if not broken:
        return []
    return [
        f"new seeds end with {name} {statistics.mean(found):.4g}, worse than the "
        f"{evidence.value:.4g} that the trials promise: the setting is near where training breaks, "
        "or the trials were lucky; run more trials, or take a smaller learning rate"
    ]


def _luckiest(study: optuna.Study, conclusion: Conclusion) -> list[str]:
    """Why it is not the best trial, where that had a setting noticeably different."""
    best = study.best_trial
    if _distance(best, conclusion) < NOTICEABLE:
        return []
    return [
        f"trial {best.number} (batch {best.params['batch_size']}, lr {best.params['lr']:.2e}) had "
        f"the best value, {best.value:.4g}; the recommendation goes by the model's mean over all "
        "trials, since a single one may have been lucky"
    ]


def _too_large(study: optuna.Study) -> list[str]:
    """What helps where trials did not fit into memory, however small the microbatch."""
    pruned = study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))
    limit = study.user_attrs.get(attributes.CONFIG, {}).get("memory_limit")
    smaller = (
        "take a smaller model or shorter samples"
        if limit is None
        else f"raise --memory-limit, now {limit / 2**20:.4g}MiB, or take a smaller model"
    )
    counts = Counter(_what_ran_out(trial) for trial in pruned if is_out_of_memory(trial))
    remedies = {
        "shared memory": "found no shared memory, through which a DataLoader hands over batches; "
        "give it more (/dev/shm; docker run --shm-size), or take fewer num_workers",
        "samples": "left a single sample by itself, which BatchNorm cannot take; use "
        "bs_optuna.training.convert_batch_norm, or larger microbatches",
        "memory": f"did not fit into memory; {smaller}",
    }
    return [
        f"{count} {'trial' if count == 1 else 'trials'} {remedies[what]}"
        for what, count in counts.items()
    ]


def _what_ran_out(trial: FrozenTrial) -> str:
    reason = trial.user_attrs.get(attributes.PRUNE_REASON, "")
    if "shared memory" in reason:
        return "shared memory"
    return "samples" if "BatchNorm cannot" in reason else "memory"


def _edges(tuning: Tuning, conclusion: Conclusion) -> list[str]:
    """What lies at an end of its range may do better beyond it."""
    found = []
    for name, value in (("batch_size", conclusion.batch_size), ("lr", conclusion.learning_rate)):
        space = tuning.objective.search_space[name]
        for end, bound in (("lowest", space.low), ("highest", space.high)):
            if space.low < space.high and math.isclose(value, bound, rel_tol=0.01):
                found.append(f"{name} is the {end} that was searched; a wider range may do better")
    return found


def _counts(study: optuna.Study) -> str:
    trials = study.get_trials(deepcopy=False)
    states = Counter(trial.state for trial in trials)
    reasons = Counter(
        trial.user_attrs.get(attributes.PRUNE_REASON, "other").partition(":")[0]
        for trial in trials
        if trial.state == TrialState.PRUNED
    )
    pruned = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    backed_off = sum(trial.user_attrs.get(attributes.BACKOFFS, 0) > 0 for trial in trials)
    return (
        f"{states[TrialState.COMPLETE]} complete, {states[TrialState.PRUNED]} pruned"
        + (f" ({pruned})" if pruned else "")
        + f", {states[TrialState.FAIL]} failed, {backed_off} backed off to smaller microbatches"
    )

"""What changes with the batch size beside the learning rate: averages, weight decay, warm-up.

Symbols: B batch size (samples per optimizer step), k = B/B0 its growth from a reference B0, lr
learning rate. Each rule keeps something in *samples* that an optimizer counts in steps.
"""

from __future__ import annotations

import math

from bs_optuna.errors import ConfigError
from bs_optuna.science.scaling import ScalingRule
from bs_optuna.science.scaling import check_positive
from bs_optuna.science.scaling import parse_scaling_rule


_WARMUP_SHARE = 0.05
_WARMUP_CAP = 0.10


def scale_beta(beta: float, k: float) -> float:
    """Keeps how many *samples* an average of Adam remembers: beta**k.

    The half-life in samples stays (Marek et al. 2025, arXiv 2507.07101, for beta2; they leave
    beta1 at 0.9). Malladi et al. 2022 (arXiv 2205.10287) have 1 - beta' = k * (1 - beta) for both
    betas, which equals this to first order in 1 - beta, since beta**k = 1 - k*(1 - beta) + ...;
    theirs needs k * (1 - beta) < 1, the power always stays below 1.

    Args:
        beta: Decay per step of the average, in [0, 1).
        k: Growth of the batch size.

    Returns:
        The decay per step at the new batch size, in [0, 1).

    Raises:
        ConfigError: beta is not in [0, 1), or k is not positive and finite.
    """
    return _decay_to_the_power("beta", beta, k)


def scale_ema_decay(decay: float, k: float) -> float:
    """Keeps how many samples an average of the *weights* remembers: decay**k.

    Busbridge et al. 2023, arXiv 2307.13813, for model averages and self-supervised teachers. Holds
    together with the learning-rate rule of the optimizer.

    Args:
        decay: Share of the old average that is kept per step, in [0, 1).
        k: Growth of the batch size.

    Returns:
        The decay per step at the new batch size, in [0, 1).

    Raises:
        ConfigError: The decay is not in [0, 1), or k is not positive and finite.
    """
    return _decay_to_the_power("decay", decay, k)


def scale_eps(eps: float, k: float) -> float:
    """Keeps Adam's eps in proportion to the noise that it is added to: eps / sqrt(k).

    Malladi et al. 2022, arXiv 2205.10287: where noise dominates, the root of the second moment
    falls as 1/sqrt(B). Notes that print eps * sqrt(k) have it the wrong way round.

    Args:
        eps: The constant in the denominator, 0 or more.
        k: Growth of the batch size.

    Returns:
        The constant at the new batch size.

    Raises:
        ConfigError: eps is negative or not finite, or k is not positive and finite.
    """
    if not 0.0 <= eps < math.inf:
        raise ConfigError(f"eps is {eps!r}; it must be 0 or more and finite, e.g. 1e-8")
    check_positive("k", k)
    return eps / math.sqrt(k)


def scale_weight_decay(
    weight_decay: float,
    *,
    from_batch_size: float,
    to_batch_size: float,
    rule: ScalingRule | str,
) -> float:
    """Keeps how many *epochs* the weights of AdamW remember: weight_decay * k / ratio of lr.

    PyTorch's AdamW shrinks the weights by lr * weight_decay per step, so they average their updates
    over B / (lr * weight_decay * N) epochs of N samples. The best such time hardly changes (Wang &
    Aitchison 2024, arXiv 2405.13698), hence lr * weight_decay grows as B: with the linear rule
    weight decay stays, with the square root it grows by sqrt(k), with constant lr by k.

    Args:
        weight_decay: `weight_decay` of `torch.optim.AdamW`, 0 or more.
        from_batch_size: Samples per step it was tuned for.
        to_batch_size: Samples per step it is wanted for.
        rule: The rule by which the learning rate is scaled.

    Returns:
        The weight decay at the new batch size.

    Raises:
        ConfigError: A number is out of bounds, or there is no such rule.
    """
    if not 0.0 <= weight_decay < math.inf:
        raise ConfigError(
            f"weight_decay is {weight_decay!r}; it must be 0 or more and finite, e.g. 0.01"
        )
    rule = parse_scaling_rule(rule) if isinstance(rule, str) else rule
    ratio = rule.ratio(from_batch_size, to_batch_size)
    return weight_decay * (to_batch_size / from_batch_size) / ratio


def warmup_steps(total_steps: int, *, beta2: float | None = None) -> int:
    """How many steps of linear warm-up to start a search from.

    5 % of the steps, or 2 / (1 - beta2) if that is more, since Adam's second moment needs as long
    to settle (Ma & Yarats 2019, arXiv 1910.04209); never more than 10 % (Godbole et al., Deep
    Learning Tuning Playbook). There is no typical value: published ones go from 100 to 40,000.

    Args:
        total_steps: Optimizer steps of the whole training.
        beta2: Decay of Adam's second moment; None for optimizers without one.

    Returns:
        Steps; 0 for a training of fewer than 10.

    Raises:
        ConfigError: There is no step, or beta2 is not in [0, 1).
    """
    check_positive("total_steps", total_steps)
    wanted = _WARMUP_SHARE * total_steps
    if beta2 is not None:
        _check_decay("beta2", beta2)
        wanted = max(wanted, 2.0 / (1.0 - beta2))
    return min(round(wanted), int(_WARMUP_CAP * total_steps))


def scale_warmup_epochs(warmup_epochs: float, k: float) -> float:
    """Warm-up in epochs for the square-root rule at large batches: warmup_epochs * k.

    LEGW (You et al. 2019, arXiv 1901.08256). An epoch then has 1/k as many steps, so the number of
    warm-up *steps* stays.

    Args:
        warmup_epochs: Epochs of warm-up at the reference, 0 or more.
        k: Growth of the batch size.

    Returns:
        Epochs of warm-up at the new batch size.

    Raises:
        ConfigError: The epochs are negative or not finite, or k is not positive and finite.
    """
    if not 0.0 <= warmup_epochs < math.inf:
        raise ConfigError(f"warmup_epochs is {warmup_epochs!r}; it must be 0 or more and finite")
    check_positive("k", k)
    return warmup_epochs * k


def _decay_to_the_power(name: str, decay: float, k: float) -> float:
    _check_decay(name, decay)
    check_positive("k", k)
    return float(decay**k)


def _check_decay(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ConfigError(f"{name} is {value!r}; it must be at least 0 and below 1, e.g. 0.999")

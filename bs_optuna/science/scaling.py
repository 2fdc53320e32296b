"""How the learning rate changes with the batch size.

Symbols: B batch size (samples per optimizer step), k = B/B0 its growth from a reference B0, lr
learning rate, Bc critical batch size (samples). Nothing here is a law of nature: over more than a
factor of ten in B no single power holds (Shallue et al. 2019, arXiv 1811.03600), so scale to start
a search, and tune.
"""

from __future__ import annotations

import math
from abc import ABC
from abc import abstractmethod
from dataclasses import dataclass
from typing import final

from bs_optuna.errors import ConfigError


_EXPONENT_BOUND = 2.0  # every published rule lies within [-0.5, 1]


class ScalingRule(ABC):
    """The best learning rate as a function of batch size, up to a constant."""

    @abstractmethod
    def ratio(self, from_batch_size: float, to_batch_size: float) -> float:
        """What to multiply the learning rate by.

        Args:
            from_batch_size: Samples per step that the learning rate was tuned for.
            to_batch_size: Samples per step that it is wanted for.

        Returns:
            lr(to) / lr(from), positive.

        Raises:
            ConfigError: A batch size is not positive and finite.
        """


@final
@dataclass(frozen=True)
class PowerRule(ScalingRule):
    """The learning rate grows as a power of the batch size: lr = lr0 * k**exponent.

    Attributes:
        exponent: 1 is the linear rule, 0.5 the square-root rule, 0 leaves lr as it is.

    Raises:
        ConfigError: The exponent is not within [-2, 2].
    """

    exponent: float

    def __post_init__(self) -> None:
        if not abs(self.exponent) <= _EXPONENT_BOUND:
            raise ConfigError(
                f"exponent {self.exponent!r} of a power rule is outside [-2, 2]; "
                "published rules use 0 to 1"
            )

    def ratio(self, from_batch_size: float, to_batch_size: float) -> float:
        """k**exponent with k = to/from."""
        check_positive("from_batch_size", from_batch_size)
        check_positive("to_batch_size", to_batch_size)
        return self.factor(to_batch_size / from_batch_size)

    def factor(self, k: float) -> float:
        """What k times the batch size does to the learning rate, wherever it starts.

        Growing in two steps is the same as in one: factor(a * b) equals factor(a) * factor(b).

        Args:
            k: Growth of the batch size.

        Returns:
            lr(k*B) / lr(B) = k**exponent.

        Raises:
            ConfigError: k is not positive and finite.
        """
        check_positive("k", k)
        return float(k**self.exponent)


@final
@dataclass(frozen=True)
class SaturatingRule(ScalingRule):
    """The learning rate grows with the batch size until the gradient is hardly noisy any more.

    lr = lr_max / (1 + Bc/B)**exponent (McCandlish et al. 2018, arXiv 1812.06162, with
    the noise scale for Bc): a power of B far below Bc, constant far above. Derived for one
    step of SGD on a quadratic loss with exponent 1; for Adam the authors suggest 0.5 to 1. It
    follows tuned language models better than one power does, though Bc grows during training.

    Attributes:
        critical_batch_size: Bc in samples, where lr has reached 0.5**exponent of its maximum.
        exponent: Slope of ln lr against ln B far below Bc.

    Raises:
        ConfigError: The critical batch size is not positive and finite, or the exponent is not
            within (0, 2].
    """

    critical_batch_size: float
    exponent: float = 1.0

    def __post_init__(self) -> None:
        check_positive("critical_batch_size", self.critical_batch_size)
        if not 0.0 < self.exponent <= _EXPONENT_BOUND:
            raise ConfigError(
                f"exponent {self.exponent!r} of a saturating rule is outside (0, 2]; "
                "use 1 for SGD, 0.5 to 1 for Adam"
            )

    def ratio(self, from_batch_size: float, to_batch_size: float) -> float:
        """((1 + Bc/from) / (1 + Bc/to))**exponent."""
        check_positive("from_batch_size", from_batch_size)
        check_positive("to_batch_size", to_batch_size)
        before = 1.0 + self.critical_batch_size / from_batch_size
        after = 1.0 + self.critical_batch_size / to_batch_size
        return float((before / after) ** self.exponent)


LINEAR = PowerRule(1.0)
"""lr * k. SGD with or without momentum, B well below Bc, with warm-up (Goyal et al. 2017, arXiv
1706.02677: ResNet-50 held its accuracy up to B = 8192). It keeps the displacement per sample: k
small steps equal one large one while the gradient hardly changes between them."""

SQRT = PowerRule(0.5)
"""lr * sqrt(k). Adam and its kin where noise dominates (Malladi et al. 2022, arXiv 2205.10287),
together with `scale_beta` and `scale_eps`; for SGD it keeps the covariance of the update, lr**2/B
(Krizhevsky 2014, arXiv 1404.5997; Hoffer et al. 2017, arXiv 1705.08741)."""

CONSTANT = PowerRule(0.0)
"""lr as it is. Right above Bc, and for Adam over a small range: tuned lr rose only threefold from
B = 1 to 1024 (Marek et al. 2025, arXiv 2507.07101)."""

_NAMED = {"linear": LINEAR, "sqrt": SQRT, "constant": CONSTANT}


def parse_scaling_rule(name: str) -> ScalingRule:
    """Finds a rule by its name.

    Args:
        name: "linear", "sqrt", "constant", "power:EXPONENT" such as "power:0.4",
            "saturating:CRITICAL_BATCH_SIZE" such as "saturating:512", or
            "saturating:CRITICAL_BATCH_SIZE:EXPONENT".

    Returns:
        The rule.

    Raises:
        ConfigError: There is no such rule, or its numbers are out of bounds.
    """
    if name in _NAMED:
        return _NAMED[name]
    kind, *texts = name.split(":")
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        numbers = []
    if kind == "power" and len(numbers) == 1:
        return PowerRule(numbers[0])
    if kind == "saturating" and len(numbers) in (1, 2):
        return SaturatingRule(*numbers)
    raise ConfigError(
        f"unknown scaling rule {name!r}; choose linear, sqrt, constant, power:EXPONENT (power:0.4) "
        "or saturating:CRITICAL_BATCH_SIZE (saturating:512)"
    )


def scale_learning_rate(
    learning_rate: float,
    *,
    from_batch_size: float,
    to_batch_size: float,
    rule: ScalingRule | str,
) -> float:
    """Carries a learning rate over to another batch size.

    Do not use it with optimizers that find their own step (D-Adaptation, Prodigy).

    Args:
        learning_rate: The learning rate tuned at `from_batch_size`.
        from_batch_size: Samples per step it was tuned for, over all devices and microbatches.
        to_batch_size: Samples per step it is wanted for.
        rule: A rule or its name, see `parse_scaling_rule`.

    Returns:
        The learning rate to start from at `to_batch_size`.

    Raises:
        ConfigError: A number is not positive and finite, or there is no such rule.
    """
    check_positive("learning_rate", learning_rate)
    rule = parse_scaling_rule(rule) if isinstance(rule, str) else rule
    return learning_rate * rule.ratio(from_batch_size, to_batch_size)


def check_positive(name: str, value: float) -> None:
    """Raises a ConfigError that names the value unless it is positive and finite."""
    if not 0.0 < value < math.inf:
        raise ConfigError(f"{name} is {value!r}; it must be positive and finite")

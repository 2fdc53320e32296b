"""The squared norms of microbatches' gradients, read as they arrive: what the noise scale needs.

Nothing is copied: a gradient is measured on its way into ``.grad``, before it is added up.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from bs_optuna.science.noise_scale import NoiseReading
from bs_optuna.science.noise_scale import read_noise
from bs_optuna.training.normalization import active_batch_norms


_HALVES = (torch.float16, torch.bfloat16)


class GradientNorms:
    """Watches one pass over the microbatches of a batch.

    Args:
        modules: What is trained; a BatchNorm in training mode among it leaves nothing to read.
        parameters: Of these.
        scaler: Of their gradients, if there is one.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        parameters: Sequence[nn.Parameter],
        *,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self._modules = modules
        self._parameters = parameters
        self._scaler = scaler
        self._weights: list[float] = []
        self._sums: list[dict[torch.device, torch.Tensor]] = []  # of squares, for each microbatch
        self._arrived: set[int] = set()  # numbers of parameters, in this one
        self._readable = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A context for the pass, in which ``.grad`` begins without a gradient."""
        self._weights, self._sums = [], []
        self._readable = not active_batch_norms(self._modules)
        trained = [p for p in self._parameters if p.requires_grad] if self._readable else []
        hooks = [p.register_hook(partial(self._add, k)) for k, p in enumerate(trained)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def microbatch(self, weight: float) -> None:
        """Call it before the backward of each microbatch, with its weight in the batch."""
        self._weights.append(weight)
        self._sums.append({})
        self._arrived = set()

    def _add(self, number: int, gradient: torch.Tensor) -> None:
        # In pieces, as a reentrant checkpoint gives it, the norm of their sum is not known.
        self._readable &= number not in self._arrived
        self._arrived.add(number)
        _add_square(self._sums[-1], gradient)

    def reading(self, batch_size: int) -> NoiseReading | None:
        """What the pass over so many samples says of the noise.

        Where the mean loss is taken over tokens, a microbatch counts as many samples as it holds
        of these, on average.

        Returns:
            None for a single microbatch, or where gradients cannot be told by samples.
        """
        if not self._readable or len(self._weights) < 2:
            return None
        whole: dict[torch.device, torch.Tensor] = {}
        for parameter in self._parameters:
            if parameter.grad is not None:
                _add_square(whole, parameter.grad)
        scale = 1.0 if self._scaler is None else self._scaler.get_scale()
        squares = [_total(sums) / scale**2 for sums in self._sums]
        return read_noise(
            sizes=[weight * batch_size for weight in self._weights],
            # A gradient arrives multiplied by the weight of its microbatch.
            squared_norms=[s / w**2 for s, w in zip(squares, self._weights, strict=True)],
            batch_squared_norm=_total(whole) / scale**2,
        )


def _add_square(sums: dict[torch.device, torch.Tensor], gradient: torch.Tensor) -> None:
    """Adds the squared norm of a gradient to the sum on its device; nothing waits for that."""
    gradient = gradient.detach()
    if gradient.layout != torch.strided:
        gradient = gradient.coalesce().values()
    dtype = torch.float32 if gradient.dtype in _HALVES else None
    norm = torch.linalg.vector_norm(gradient, dtype=dtype)
    if norm.device.type != "mps":  # which has no double precision
        norm = norm.double()
    before = sums.get(norm.device)
    sums[norm.device] = norm.square() if before is None else before + norm.square()


def _total(sums: dict[torch.device, torch.Tensor]) -> float:
    return sum(float(total) for total in sums.values())

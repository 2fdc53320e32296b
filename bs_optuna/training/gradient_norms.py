"""The squared norms of microbatches' gradients, read as they arrive: what the noise scale needs.

Nothing is copied: a gradient is measured on its way into ``.grad``, before it is added up.
"""

from __future__ import annotations

from collections.abc import Iterable
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
        self._norms: list[dict[int, torch.Tensor]] = []  # by number of the parameter
        self._readable = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A context for the pass, in which ``.grad`` begins without a gradient."""
        self._weights, self._norms = [], []
        self._readable = not active_batch_norms(self._modules)
        trained = [p for p in self._parameters if p.requires_grad] if self._readable else []
        hooks = [p.register_hook(partial(self._arrived, k)) for k, p in enumerate(trained)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def microbatch(self, weight: float) -> None:
        """Call it before the backward of each microbatch, with its weight in the batch."""
        self._weights.append(weight)
        self._norms.append({})

    def _arrived(self, number: int, gradient: torch.Tensor) -> None:
        norms = self._norms[-1]
        # In pieces, as a reentrant checkpoint gives it: the norm of their sum is not known.
        self._readable &= number not in norms
        norms[number] = _norm(gradient)

    def reading(self, batch_size: int) -> NoiseReading | None:
        """What the pass over so many samples says of the noise.

        Where the mean loss is taken over tokens, a microbatch counts as many samples as it holds
        of these, on average.

        Returns:
            None for a single microbatch, or where gradients cannot be told by samples.
        """
        if not self._readable or len(self._weights) < 2:
            return None
        scale = 1.0 if self._scaler is None else self._scaler.get_scale()
        whole = [_norm(p.grad) for p in self._parameters if p.grad is not None]
        squares = [_sum_of_squares(norms.values()) / scale**2 for norms in self._norms]
        return read_noise(
            sizes=[weight * batch_size for weight in self._weights],
            # A gradient arrives multiplied by the weight of its microbatch.
            squared_norms=[s / w**2 for s, w in zip(squares, self._weights, strict=True)],
            batch_squared_norm=_sum_of_squares(whole) / scale**2,
        )


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient.detach()
    if gradient.layout != torch.strided:
        gradient = gradient.coalesce().values()
    dtype = torch.float32 if gradient.dtype in _HALVES else None
    norm: torch.Tensor = torch.linalg.vector_norm(gradient, dtype=dtype)
    return norm


def _sum_of_squares(norms: Iterable[torch.Tensor]) -> float:
    """Asks the device once, not for each parameter."""
    found = list(norms)
    if not found:
        return 0.0
    together = torch.stack([norm.to(found[0].device) for norm in found])
    return float(together.cpu().double().square().sum())

"""Finds what a loss trains that nobody looks after, whose gradient no undoing would take back."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch
from torch import nn

from bs_optuna.training.snapshot import StepSnapshot


class ForeignLeaves:
    """Refuses losses that train parameters which neither the model nor the loss function holds.

    The graph of the first loss tells. A tensor in it that is no parameter may be made anew in each
    pass, such as the points at which a penalty differentiates; then the next loss shows other ones.
    A loss may change later, which matters once a pass has failed: the next one is looked at anew.
    """

    def __init__(self) -> None:
        self._passes = 0
        self._seen: list[weakref.ref[torch.Tensor]] = []

    def forget(self) -> None:
        """Call it where a pass has failed."""
        self._passes, self._seen = 0, []

    def check(self, loss: torch.Tensor, before: StepSnapshot) -> None:
        """Call it before backward; it does nothing once all is known.

        Args:
            loss: With its graph.
            before: Knows what is looked after, and looks after what remains open.

        Raises:
            ValueError: The loss trains something else.
        """
        if self._passes and not self._seen:
            return
        known = before.given()
        seen = {id(leaf) for reference in self._seen if (leaf := reference()) is not None}
        unknown = [leaf for leaf in _leaves(loss) if id(leaf) not in known]
        for leaf in unknown:
            if isinstance(leaf, nn.Parameter) or leaf.grad is not None or id(leaf) in seen:
                raise ValueError(
                    f"The loss trains a tensor of shape {tuple(leaf.shape)} that neither the model "
                    "nor the loss held as a parameter when AccumulatedBackward was made, so its "
                    "gradient could not be put back when memory runs out. Put it into the model, "
                    "or pass loss_fn as an nn.Module that holds it; if it is not to be trained, "
                    "freeze it with requires_grad_(False), or take tensor.detach() anew each time."
                )
            before.look_after(leaf)
        self._passes += 1
        self._seen = [weakref.ref(leaf) for leaf in unknown] if self._passes == 1 else []


def _leaves(loss: torch.Tensor) -> Iterator[torch.Tensor]:
    """The leaves that a backward would give gradients to."""
    waiting, met = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in met:
            continue
        met.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            yield node.variable  # type: ignore[attr-defined]
        waiting += [following for following, _ in node.next_functions]

"""Training and evaluation mode of modules, without losing what a task has chosen for parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def begin_training(model: nn.Module) -> nn.Module:
    """The model in training mode, but for parts that were put into evaluation mode by themselves.

    A frozen backbone is meant to stay so; a whole model in evaluation mode is how libraries return
    a pretrained one.
    """
    return model if model.training else model.train()


@contextmanager
def evaluating(*parts: object) -> Iterator[None]:
    """A context in which those that are modules are in evaluation mode; after it all are as before.

    Args:
        parts: The model, and the loss, which may hold a norm or dropout too.
    """
    roots = [part for part in parts if isinstance(part, nn.Module)]
    before = [(module, module.training) for root in roots for module in root.modules()]
    for root in roots:
        root.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training  # train() would reach the parts too

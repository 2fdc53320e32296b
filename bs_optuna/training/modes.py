"""Training and evaluation mode of modules, without losing what a task has chosen for parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def begin_training(model: nn.Module) -> nn.Module:
    """The model in training mode, but for frozen parts that a task has put into evaluation mode.

    What has something to train is trained in training mode, also where a library has returned it in
    the other one, as it does pretrained models.
    """
    if not model.training:
        return model.train()
    for module in model.modules():
        if not module.training and any(p.requires_grad for p in module.parameters()):
            module.train()
    return model


@contextmanager
def evaluating(*parts: object) -> Iterator[None]:
    """A context in which those that are modules are in evaluation mode; after it all are as before.

    Args:
        parts: The model, and the loss, which may hold a norm or dropout too.
    """
    roots = [(part, part.training) for part in parts if isinstance(part, nn.Module)]
    before = [(module, module.training) for root, _ in roots for module in root.modules()]
    for root, _ in roots:
        root.eval()
    try:
        yield
    finally:
        for root, training in roots:
            root.train(training)  # which some modules do something in
        for module, training in before:
            module.training = training  # of parts that are in another mode

"""Run as one of two processes: training on ranks of which number 1 alone meets some trouble.

Each case returns what its rank ended with; test_ranks.py compares.
"""

from __future__ import annotations

import copy
import gc
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


sys.path.insert(0, str(Path(__file__).parents[1]))

from failing import FailingAt
from ranks import rank_main

from bs_optuna.errors import BsOptunaError
from bs_optuna.errors import MicrobatchDoesNotFitError
from bs_optuna.training import AccumulatedBackward
from bs_optuna.training import GuardedStep
from bs_optuna.training.memory_limit import memory_limit


IGNORED = -100
PARTS = (5, 3)  # samples of each rank
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "plain": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, foreach=False),
}


def allocate_too_much() -> None:
    """The allocator's own refusal, whatever the machine."""
    torch.empty(2**55)


# --- the gradient of the whole batch -------------------------------------------------------------


class Branches(nn.Module):
    """One layer for every sample, one that only large first features reach, one for nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(5, 7)
        self.sometimes = nn.Linear(5, 7)
        self.never = nn.Linear(5, 7)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.head = nn.Linear(7, 3)
        self.last = nn.Conv1d(9, 9, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.trunk(x)
        large = x[:, :1, :1] > 10
        if large.any():
            hidden = torch.where(large, hidden + self.sometimes(x), hidden)
        return self.last(self.head(torch.tanh(self.frozen(hidden))))


def branches(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Branches().double()


def sequences(reduction: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight samples of up to nine tokens; the last two, on rank 1, reach another layer."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(PARTS), 9, 5, dtype=torch.float64, generator=generator)
    x[-2:, :, 0] += 20
    y = torch.randint(3, (sum(PARTS), 9), generator=generator)
    if reduction == "tokens":
        for row, length in enumerate((9, 0, 4, 1, 7, 2, 0, 3)):
            y[row, length:] = IGNORED
    return x, y


def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def summed(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="sum")


def counted(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (targets != IGNORED).sum()


def settings(reduction: str) -> dict[str, Any]:
    if reduction == "sum":
        return {"loss_fn": summed, "reduction": "sum"}
    return {"loss_fn": loss_fn, "count": counted if reduction == "tokens" else None}


def part(rank: int, tensor: torch.Tensor) -> torch.Tensor:
    return tensor[: PARTS[0]] if rank == 0 else tensor[PARTS[0] :]


def gradients(model: nn.Module) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def whole_batch(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for reduction in ("samples", "tokens", "sum"):
        for size in (1, 2, 8):
            x, y = (part(rank, tensor) for tensor in sequences(reduction))
            x = x.requires_grad_()
            model = branches(seed=rank)  # rank 1 gets the parameters of rank 0
            backward = AccumulatedBackward(
                model, microbatch_size=size, process_group=dist.group.WORLD, **settings(reduction)
            )
            result = backward(x, y)
            once = gradients(model)
            backward(x.detach(), y)
            found[f"{reduction} {size}"] = {
                "result": result, "gradients": once, "twice": gradients(model), "inputs": x.grad
            }  # fmt: skip
    found["empty"] = nothing_on_rank_1(rank)
    return found


def nothing_on_rank_1(rank: int) -> list[torch.Tensor | None]:
    """Rank 1 holds no target at all."""
    x, y = (part(rank, tensor) for tensor in sequences("samples"))
    if rank == 1:
        y = torch.full_like(y, IGNORED)
    model = branches(seed=0)
    AccumulatedBackward(model, process_group=dist.group.WORLD, **settings("tokens"))(x, y)
    return gradients(model)


# --- out of memory on rank 1 ---------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(2 * 16, 3),
    )  # fmt: skip


def images(rank: int, n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 + rank)
    return torch.randn(n, 1, 6, 6, generator=generator), torch.randint(3, (n,), generator=generator)


class Recording(FailingAt):
    """Also knows where a part ends that no collective is in."""

    def __init__(self, position: int | None) -> None:
        super().__init__(position)
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace != "profiler":  # which is not counted either
            self.names.append(str(func))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def own(self) -> int:
        """How many operations come before the ranks tell each other how it went."""
        collective = next(i for i, name in enumerate(self.names) if name.startswith("c10d."))
        return max(i for i in range(collective) if self.names[i].startswith("aten.zero_"))


def two_steps(
    rank: int, optimizer: str, size: int | None, devices: tuple[FailingAt, FailingAt]
) -> list[Any]:
    """State after two steps, of which rank 1's first meets a failing device."""
    model = network()
    made = OPTIMIZERS[optimizer](model.parameters())
    backward = AccumulatedBackward(
        model, nn.functional.cross_entropy, microbatch_size=size or "auto",
        process_group=dist.group.WORLD,
    )  # fmt: skip
    step = GuardedStep(made, max_norm=0.1, process_group=dist.group.WORLD)
    torch.manual_seed(2 + rank)
    results = []
    for number in range(2):
        made.zero_grad()
        batch = images(rank)
        for device, action in zip(devices, (partial(backward, *batch), step), strict=True):
            if rank == 1 and number == 0:
                with device:
                    results.append(action())
            else:
                results.append(action())
    return copy.deepcopy([
        model.state_dict(), gradients(model), made.state_dict(), torch.get_rng_state(),
        [(r.microbatch_size, r.batch_size, r.accumulation_steps, r.loss) for r in results if r],
    ])  # fmt: skip


def any_operation(rank: int) -> dict[str, Any]:
    """Every operation of a step of rank 1 fails once."""
    gc.freeze()  # each failure collects garbage: leave out what was there before
    found: dict[str, Any] = {"failures": 0, "positions": 0}
    for optimizer in OPTIMIZERS:
        two_steps(rank, optimizer, None, (FailingAt(None), FailingAt(None)))  # first uses
        clean = (Recording(None), Recording(None))
        whole = two_steps(rank, optimizer, None, clean)
        halves = two_steps(rank, optimizer, 2, (FailingAt(None), FailingAt(None)))
        found[optimizer] = {"whole": whole, "halves": halves, "backward": [], "step": []}
        for where, name in enumerate(("backward", "step")):
            if name == "backward" and optimizer != "fused":  # which is the same for all
                continue
            own = torch.tensor(clean[where].own() if rank == 1 else 0)
            dist.broadcast(own, 1)
            for position in range(int(own)):
                devices = [FailingAt(None), FailingAt(None)]
                devices[where] = FailingAt(position)
                found[optimizer][name].append(
                    two_steps(rank, optimizer, None, (devices[0], devices[1]))
                )
                found["failures"] += devices[where].failures
                found["positions"] += 1
    return found


class Watch(logging.Handler):
    """Notes where each attempt of this rank ran out of memory."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.phase = ""
        self.where: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        stepping = record.name.endswith("stepping")
        self.where.append("stepping" if stepping else self.phase)


class Scale(nn.Module):
    """A product whose backward pass takes more memory than the forward pass did.

    Most of its weights are as good as unused: they make the optimizer's step large. There is no
    matrix product, which MKL rounds in another order where the last megabyte is missing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16, 32, 32))
        self.many = nn.Parameter(torch.ones(500_000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight).mean(dim=(2, 3)) + self.many.mean()


def limited_training(
    rank: int, sizes: list[int | None], limit: Any, watch: Watch
) -> tuple[list[torch.Tensor], list[int]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Tanh(), nn.Dropout(0.3), nn.GELU(), Scale(), nn.Linear(16, 4)
    )  # fmt: skip
    model.register_forward_pre_hook(lambda *_: setattr(watch, "phase", "forward"))

    def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = outputs.square().mean()
        loss.register_hook(lambda _: setattr(watch, "phase", "backward"))
        return loss

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True)
    group = dist.group.WORLD
    backward = AccumulatedBackward(model, loss_fn, process_group=group)
    step = GuardedStep(optimizer, max_norm=1.0, process_group=group)
    x = torch.randn(32, 16, 32, 32, generator=torch.Generator().manual_seed(rank))
    torch.manual_seed(3 + rank)
    ran = []
    for size in sizes:
        if size is not None:
            backward = AccumulatedBackward(
                model, loss_fn, microbatch_size=size, process_group=group
            )
        optimizer.zero_grad()
        with limit.active():
            ran.append(backward(x, x[:, 0, 0, 0]).microbatch_size)
            step()
    moments = [t for entry in optimizer.state.values() for t in entry.values()]
    return [*model.state_dict().values(), *moments, torch.get_rng_state()], ran


def real_limits(rank: int) -> dict[str, Any]:
    """Rank 1 alone trains under limits of the real allocator, rank 0 without any."""
    torch.backends.mkldnn.set_flags(False)  # as under a limit, also where there is none
    watch, own = Watch(), logging.getLogger("bs_optuna.training")
    own.setLevel(logging.INFO)
    free = memory_limit(torch.device("cpu"), None)
    limits = [memory_limit(torch.device("cpu"), m * 2**20) for m in range(2, 33, 2)]
    limits[0].warm_up(lambda: limited_training(rank, [None], free, watch))
    found: dict[str, Any] = {"ends": [], "where": watch.where, "whole": 0}
    for limit in limits:
        mine = limit if rank == 1 else free
        mine.start_trial()
        own.addHandler(watch)
        try:
            state, ran = limited_training(rank, [None, None], mine, watch)
        except BsOptunaError as error:
            found["ends"].append(str(error))
            continue
        finally:
            own.removeHandler(watch)
        expected, _ = limited_training(rank, list(ran), free, watch)
        assert all(torch.equal(a, b) for a, b in zip(state, expected, strict=True)), limit
        parameters = torch.cat([t.flatten() for t in state[:4]])
        found["ends"].append(parameters.double().sum().item())
        found["whole"] += ran[-1] == 32
    return found


# --- errors that one rank has --------------------------------------------------------------------


class Hungry(nn.Module):
    """Runs out of memory above a microbatch size, in forward or in backward."""

    def __init__(self, fits: float, where: str) -> None:
        super().__init__()
        self.net = network()
        self.fits, self.where = fits, where
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(x))
        outputs: torch.Tensor = self.net(x)
        if len(x) > self.fits and self.where == "forward":
            allocate_too_much()
        if len(x) > self.fits and outputs.requires_grad:
            outputs.register_hook(lambda _: allocate_too_much())
        return outputs


def backing_off(rank: int) -> dict[str, Any]:
    """Ragged parts, 12 and 7 samples; what rank 1 cannot hold, rank 0 does not try either."""
    found = {}
    for where in ("forward", "backward"):
        for fits in (3, 0):
            model = Hungry(fits if rank == 1 else 99, where)
            backward = AccumulatedBackward(
                model, nn.functional.cross_entropy, process_group=dist.group.WORLD
            )
            batch = images(rank, 12 if rank == 0 else 7)
            torch.manual_seed(5)
            before = torch.get_rng_state()
            try:
                end: Any = backward(*batch)
            except MicrobatchDoesNotFitError as error:
                end = (str(error), error.sizes_tried, error.bytes_requested)
                assert torch.equal(torch.get_rng_state(), before)
            found[f"{where} {fits}"] = (
                end, list(model.seen), backward.microbatch_size, gradients(model)
            )  # fmt: skip
    return found


def messages(rank: int) -> dict[str, Any]:
    """What each rank raises where rank 1 alone, or both together, did something wrong."""
    group = dist.group.WORLD
    found: dict[str, Any] = {}

    def attempt(name: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            found[name] = (type(error).__name__, str(error))

    def wrong_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if rank == 1:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)")
        return nn.functional.cross_entropy(outputs, targets)

    model = network()
    batch = images(rank)
    attempt("own", lambda: AccumulatedBackward(model, wrong_loss, process_group=group)(*batch))
    found["untouched"] = gradients(model)
    fine = AccumulatedBackward(model, nn.functional.cross_entropy, process_group=group)
    attempt("batch", lambda: fine(batch[0], batch[1][: 4 - rank]))
    scaled = AccumulatedBackward(
        model, nn.functional.cross_entropy, process_group=group,
        scaler=torch.amp.GradScaler("cpu", init_scale=2.0 + rank),
    )  # fmt: skip
    attempt("scale", lambda: scaled(*batch))
    nothing = {"count": lambda inputs, targets: 0}
    empty = AccumulatedBackward(model, nn.functional.cross_entropy, process_group=group, **nothing)
    attempt("nothing", lambda: empty(*batch))
    model[0].weight.requires_grad_(rank == 0)
    attempt("frozen", lambda: fine(*batch))
    model[0].weight.requires_grad_(True)
    sparse = nn.Sequential(nn.Embedding(4, 2, sparse=True))
    embedded = AccumulatedBackward(sparse, lambda o, t: o.sum(), process_group=group)
    attempt("sparse", lambda: embedded(torch.tensor([1, 2])))
    other = nn.Linear(3 + rank, 2)
    attempt("models", lambda: AccumulatedBackward(other, wrong_loss, process_group=group))
    wrapped = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
    attempt("wrapped", lambda: AccumulatedBackward(wrapped, wrong_loss, process_group=group))
    synchronized = nn.Sequential(nn.SyncBatchNorm(3))
    attempt("sync", lambda: AccumulatedBackward(synchronized, wrong_loss, process_group=group))
    alone = dist.new_group([0])
    if rank == 1:
        attempt("outside", lambda: AccumulatedBackward(model, wrong_loss, process_group=alone))
    fine(*batch)  # after all of that the ranks still understand each other
    found["after"] = gradients(model)
    return found


def failing_steps(rank: int) -> dict[str, Any]:
    """Optimizers that never get through on rank 1, in the first step or in the second."""
    found: dict[str, Any] = {}
    for optimizer in OPTIMIZERS:
        for scaled in (False, True):
            for good_steps in (0, 1):
                name = f"{optimizer}{' scaled' * scaled} {good_steps}"
                found[name] = failing_step(rank, optimizer, scaled, good_steps)
    return found


def failing_step(rank: int, optimizer: str, scaled: bool, good_steps: int) -> Any:
    model, group = network(), dist.group.WORLD
    made = OPTIMIZERS[optimizer](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1, enabled=scaled)
    backward = AccumulatedBackward(
        model, nn.functional.cross_entropy, scaler=scaler, process_group=group
    )
    step = GuardedStep(made, scaler=scaler, process_group=group)
    torch.manual_seed(2 + rank)

    def state() -> list[Any]:
        return copy.deepcopy([model.state_dict(), made.state_dict(), scaler.state_dict()])

    def no_room(*_: Any) -> None:
        if rank == 1:
            allocate_too_much()

    for _ in range(good_steps):
        made.zero_grad()
        backward(*images(rank))
        step()
    made.zero_grad()
    backward(*images(rank))
    before = state()
    # A fused step cannot fail once it touched a parameter; others fail when all is done.
    register = made.register_step_pre_hook if optimizer == "fused" else made.register_step_post_hook
    hook = register(no_room)
    try:
        step()
        message = "no error"
    except BsOptunaError as error:
        message = f"{type(error).__name__}: {error}"
    after = state()
    hook.remove()
    made.zero_grad()
    backward(*images(rank))
    step()
    return {"before": before, "after": after, "message": message, "later": state()}


def scaled_steps(rank: int) -> dict[str, Any]:
    """An overflow on rank 1 alone, and an error of its own in an optimizer's step."""
    found: dict[str, Any] = {}
    for optimizer in OPTIMIZERS:
        model, group = network(), dist.group.WORLD
        made = OPTIMIZERS[optimizer](model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        backward = AccumulatedBackward(
            model, nn.functional.cross_entropy, scaler=scaler, process_group=group
        )
        step = GuardedStep(made, max_norm=1.0, scaler=scaler, process_group=group)
        before = copy.deepcopy(model.state_dict())
        x, y = images(rank)
        backward(torch.full_like(x, float("inf")) if rank == 1 else x, y)
        step()
        found[optimizer] = {
            "before": before, "after": copy.deepcopy(model.state_dict()),
            "scale": scaler.get_scale(),
        }  # fmt: skip

    def mistaken(*_: Any) -> None:
        if rank == 1:
            raise KeyError("weight")

    made.zero_grad()
    backward(*images(rank))
    made.register_step_pre_hook(mistaken)
    try:
        step()
    except (KeyError, BsOptunaError) as error:
        found["own"] = f"{type(error).__name__}: {error}"
    return found


if __name__ == "__main__":
    rank_main(
        {
            "whole_batch": whole_batch,
            "any_operation": any_operation,
            "real_limits": real_limits,
            "backing_off": backing_off,
            "messages": messages,
            "failing_steps": failing_steps,
            "scaled_steps": scaled_steps,
        }
    )

"""Two gloo processes agree, whatever happens to one of them, and train as one would."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import assert_equal
from ranks import OPTIMIZERS
from ranks import gradients
from ranks import run_ranks

from bs_optuna.errors import ConfigError
from bs_optuna.training import AccumulatedBackward
from bs_optuna.training import GuardedStep


sys.path.insert(0, str(Path(__file__).parent))

import ranks_batches


pytestmark = pytest.mark.slow

linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems set no limit on a CPU")

FOLDER = Path(__file__).parent


def assert_close(found: list[Any], expected: list[Any]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() <= (1e-12 if a.dtype == torch.float64 else 1e-6) * b.norm()


def alone(reduction: str, targets: torch.Tensor | None = None) -> tuple[Any, list[Any], Any]:
    """Loss, gradients and those of the inputs of one process with the whole batch."""
    x, y = ranks_batches.sequences(reduction)
    x.requires_grad_()
    model = ranks_batches.branches(seed=0)
    loss = ranks_batches.settings(reduction)["loss_fn"](model(x), y if targets is None else targets)
    loss.backward()
    return loss, gradients(model), x.grad


def test_the_gradient_is_that_of_one_process_with_the_whole_batch(tmp_path: Path) -> None:
    ranks = run_ranks(FOLDER / "ranks_batches.py", "whole_batch", tmp_path)
    for reduction in ("samples", "tokens", "sum"):
        loss, expected, of_inputs = alone(reduction)
        assert expected[5:9] == [None] * 4  # the layers that are never reached or frozen
        for size in (1, 2, 8):
            case = f"{reduction} {size}"
            assert_equal(ranks[0][case]["gradients"], ranks[1][case]["gradients"])
            assert_equal(ranks[0][case]["twice"], ranks[1][case]["twice"])
            assert_equal(ranks[0][case]["state"], ranks_batches.branches(seed=0).state_dict())
            assert_equal(ranks[1][case]["state"], ranks_batches.branches(seed=0).state_dict())
            assert_close(ranks[0][case]["gradients"], expected)
            assert_close(ranks[0][case]["twice"], [None if g is None else 2 * g for g in expected])
            assert_close([torch.cat([rank[case]["inputs"] for rank in ranks])], [of_inputs])
            for rank in ranks:
                result = rank[case]["result"]
                assert result.loss.item() == pytest.approx(loss.item(), rel=1e-12)
                assert (result.batch_size, result.microbatch_size) == (8, min(size, 5))
                assert result.accumulation_steps == -(-5 // size)
    for budget in ranks_batches.BUDGETS:
        for rank in ranks:
            result, found = rank[f"budget {budget}"]
            assert_close(found, alone("tokens")[1])
            assert result.loss.item() == pytest.approx(alone("tokens")[0].item(), rel=1e-12)
            assert 1 < result.sizes_tried[0] <= budget
    assert_equal(ranks[0]["trained"], ranks[1]["trained"])
    assert_close(ranks[0]["trained"], ranks_batches.trained(None))
    assert_equal(ranks[0]["bfloat16"], ranks[1]["bfloat16"])
    assert ranks[0]["bfloat16"].dtype == torch.float32
    y = ranks_batches.sequences("samples")[1]
    y[ranks_batches.PARTS[0] :] = ranks_batches.IGNORED
    assert_equal(ranks[0]["empty"], ranks[1]["empty"])
    for found, expected in zip(ranks[0]["empty"], alone("samples", y)[1], strict=True):
        # Rank 1's samples are the ones that reach one layer; without targets it was not run there.
        if found is None:
            assert expected is None or not expected.any()
        else:
            assert_close([found], [expected])


def test_any_operation_may_fail_on_rank_1_alone(tmp_path: Path) -> None:
    ranks = run_ranks(FOLDER / "ranks_memory.py", "any_operation", tmp_path)
    assert ranks[0]["failures"] == 0
    assert ranks[1]["failures"] == ranks[1]["positions"] > 150
    for optimizer in OPTIMIZERS:
        first, second = (rank[optimizer] for rank in ranks)
        assert_equal(first["whole"][:3], second["whole"][:3])  # the random states are their own
        for rank in (first, second):
            for found in rank["backward"]:
                assert_equal(found, rank["halves"])
            for found in rank["step"]:
                assert_equal(found, rank["whole"])
            for microbatch_size, batch_size, accumulation_steps, _ in rank["halves"][4]:
                assert batch_size == microbatch_size * accumulation_steps * 2 == 8


@linux
def test_a_real_limit_on_rank_1_alone(tmp_path: Path) -> None:
    ranks = run_ranks(FOLDER / "ranks_memory.py", "real_limits", tmp_path)
    for where in ("forward", "backward", "stepping"):
        assert ranks[1]["where"].count(where) >= 3
    assert ranks[1]["whole"] >= 1  # the largest limit holds the whole batch: the sweep met the edge
    for first, second in zip(ranks[0]["ends"], ranks[1]["ends"], strict=True):
        if isinstance(second, str):
            assert first.startswith("Out of memory (rank 1)")
            assert second.startswith("Out of memory (cpu)")
        else:
            assert first == second
    assert sum(isinstance(end, float) for end in ranks[1]["ends"]) >= 3


@linux
@pytest.mark.parametrize("case", ["nothing_left", "over_its_limit"])
def test_a_rank_without_memory_can_tell_so(case: str, tmp_path: Path) -> None:
    told, told_1 = run_ranks(FOLDER / "ranks_memory.py", case, tmp_path)
    assert told == told_1 == [([[1.0, 0.0], [2.0, 1.0]], [])] * 3


def test_all_ranks_halve_to_what_the_smallest_can_hold(tmp_path: Path) -> None:
    ranks = run_ranks(FOLDER / "ranks_memory.py", "backing_off", tmp_path)
    for where in ("forward", "backward"):
        (result, seen, limit, grads), (result_1, seen_1, limit_1, grads_1) = (
            rank[f"{where} 3"] for rank in ranks
        )
        assert seen == [12, 3, 3, 3, 3]
        assert seen_1 == [7, 3, 2, 2]
        assert limit == limit_1 == 3
        assert_equal(grads, grads_1)
        for each in (result, result_1):
            assert (each.batch_size, each.microbatch_size, each.accumulation_steps) == (19, 3, 4)
            assert each.sizes_tried == (12, 3)
        assert torch.equal(result.loss, result_1.loss)
        for rank, cause in zip(ranks, ("rank 1", "cpu"), strict=True):
            error, _, _, grads = rank[f"{where} 0"]
            assert error[0].startswith(f"Out of memory ({cause}) with microbatch_size=1, ")
            assert error[1:] == ((12, 3, 1), 2**57)
            assert grads == [None] * len(grads)
    (result, *_), (_, seen, limit, _) = (rank["onednn 3"] for rank in ranks)
    assert result.sizes_tried == (12,)
    assert (seen, limit) == ([7, 7], None)


def test_the_error_names_the_microbatch_of_the_rank_that_failed(tmp_path: Path) -> None:
    messages = run_ranks(FOLDER / "ranks_memory.py", "one_sample", tmp_path)
    for message, cause in zip(messages, ("rank 1", "cpu"), strict=True):
        assert message.startswith(f"Out of memory ({cause}) with microbatch_size=1, ")


def test_all_ranks_shrink_and_grow_back_together(tmp_path: Path) -> None:
    ranks = run_ranks(FOLDER / "ranks_growing.py", "growing", tmp_path)
    assert_equal(ranks[0], ranks[1])
    spike = [(12, 3), (3,), (6, 3), *[(3,)] * 3, (6,), *[(6,)] * 3, (12,), (12,)]
    assert [tried for tried, *_ in ranks[0]["spike"]] == spike
    assert [limit for _, limit, *_ in ranks[0]["spike"]] == [3] * 6 + [6] * 4 + [12] * 2
    assert [lost for _, _, lost, _ in ranks[0]["spike"]] == [1, 1, *[2] * 10]
    assert [tried for tried, *_ in ranks[0]["never"]] == [(12, 3), *[(3,)] * 11]
    # The try of call 2, by rank 0 alone, has doubled the wait of rank 1 too.
    swapped = [(12, 6, 3), (3,), (6, 3), *[(3,)] * 3, (6,), *[(6,)] * 3, (12,), (12,)]
    assert [tried for tried, *_ in ranks[0]["swapped"]] == swapped
    assert [tried for tried, *_ in ranks[0]["budget"]] == [
        tuple(5 * size for size in call) for call in spike
    ]
    for found in (*ranks[0]["any"], ranks[0]["any budget"]):
        outcomes = [tried for tried, *_ in found]
        assert any(0 in tried for tried in outcomes)
        limits = [limit for _, limit, *_ in found if limit is not None]
        assert any(before < after for before, after in itertools.pairwise(limits))
        assert found[-1][2] == sum(len(tried) - 1 for tried in outcomes)


def test_a_step_that_never_fits_on_rank_1_is_taken_by_none(tmp_path: Path) -> None:
    ranks = run_ranks(FOLDER / "ranks_errors.py", "failing_steps", tmp_path)
    for optimizer in OPTIMIZERS:
        for case in (f"{optimizer}{scaled} {n}" for scaled in ("", " scaled") for n in (0, 1)):
            first, second = (rank[case] for rank in ranks)
            for rank in (first, second):
                assert_equal(rank["after"], rank["before"])
            assert_equal(first["later"], second["later"])
            assert not torch.equal(first["later"][0]["0.weight"], first["after"][0]["0.weight"])
            assert first["message"].startswith("StepDoesNotFitError: Out of memory (rank 1) in its")
            assert second["message"].startswith("StepDoesNotFitError: Out of memory (cpu) in opti")
            assert (first["lost"].attempts, second["lost"].attempts) == (1, 3)
            assert first["lost"].seconds > 0


def test_a_step_that_rank_1_can_do_in_part_is_done_in_that_part_by_both(tmp_path: Path) -> None:
    first, second = run_ranks(FOLDER / "ranks_errors.py", "half_steps", tmp_path)
    assert_equal(first["states"], second["states"])
    for rank, where in ((first, "(rank 1) in its step"), (second, "(cuda) in optimizer.step")):
        assert rank["message"].startswith(f"StepDoesNotFitError: Out of memory {where}, 2,147,")
        assert "groups had been stepped and stay so: load your last checkpoint" in rank["message"]
    (before, _), (after, optimizer) = first["states"][2:4]
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (tensor.ndim == 1)
    assert sorted(int(state["step"]) for state in optimizer["state"].values()) == [2] * 4 + [3] * 2


def test_a_hook_that_never_fits_on_rank_1_leaves_the_step_done_on_both(tmp_path: Path) -> None:
    ranks = run_ranks(FOLDER / "ranks_errors.py", "hooked_steps", tmp_path)
    for good_steps, (first, second) in enumerate(zip(*ranks, strict=True)):
        assert_equal(first["state"], second["state"])
        for rank, where in ((first, "(rank 1) in its step"), (second, "(cpu) in optimizer.step")):
            assert rank["message"].startswith(f"StepDoesNotFitError: Out of memory {where}")
            assert "groups had been stepped and stay so" in rank["message"]
        steps = {int(state["step"]) for state in first["state"][1]["state"].values()}
        assert steps == {good_steps + 2}


def test_an_overflow_on_rank_1_skips_the_step_of_all(tmp_path: Path) -> None:
    ranks = run_ranks(FOLDER / "ranks_errors.py", "scaled_steps", tmp_path)
    for optimizer in OPTIMIZERS:
        for rank in ranks:
            assert_equal(rank[optimizer]["after"], rank[optimizer]["before"])
            assert rank[optimizer]["scale"] == 4.0
    assert ranks[0]["own"].startswith("RanksError: Rank 1 failed in its step with an error of its")
    assert ranks[1]["own"] == "KeyError: 'weight'"


def test_errors_reach_all_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(FOLDER / "ranks_errors.py", "messages", tmp_path)
    for case, error, text in (
        ("own", "RuntimeError", "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        ("batch", "ValueError", "The tensors of the batch hold [3, 4] samples; all must"),
    ):
        assert second[case][0] == error
        assert second[case][1].startswith(text)
        assert first[case][0] == "RanksError"
        assert first[case][1].startswith("Rank 1 failed with an error of its own")
    for case, error, text in (
        ("norm", "MicrobatchDoesNotFitError", "BatchNorm cannot take the single sample that"),
        ("room", "RanksError", "A rank has no memory to exchange gradients; give all ranks more"),
        ("scale", "RanksError", "The ranks scale their gradients by [2.0, 3.0]; give each a"),
        ("nothing", "ValueError", "count is 0 on every rank; must be positive on one"),
        ("frozen", "RanksError", "The ranks train different parameters; set requires_grad alike"),
        ("sparse", "ConfigError", "A gradient of shape (4, 2) is sparse; use dense ones"),
        ("models", "RanksError", "The ranks' models differ in number, shape or type of"),
        ("parameters", "ConfigError", "process_group: the model has no parameters to share"),
        ("wrapped", "ConfigError", "The model is wrapped in DistributedDataParallel, whose"),
        ("sync", "ConfigError", "The model holds a SyncBatchNorm, whose forward waits for a rank"),
    ):
        for rank in (first, second):
            assert rank[case][0] == error
            assert rank[case][1].startswith(text)
    assert second["outside"][0] == "ConfigError"
    assert "this process must be one of its ranks" in second["outside"][1]
    assert all(g is None for rank in (first, second) for g in rank["untouched"])
    assert_equal(first["after"], second["after"])


def test_a_group_needs_torch_distributed() -> None:
    model = torch.nn.Linear(2, 1)
    group: Any = object()
    with pytest.raises(ConfigError, match=r"call torch\.distributed\.init_process_group\(\) first"):
        AccumulatedBackward(model, torch.nn.functional.mse_loss, process_group=group)
    with pytest.raises(ConfigError, match=r"call torch\.distributed\.init_process_group\(\) first"):
        GuardedStep(torch.optim.SGD(model.parameters(), lr=0.1), process_group=group)

"""Gradients and losses on two gloo ranks equal those of one process."""

from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.loading_script import load
from tests.helpers import base_model_folder
from tests.helpers.rank_runs import train
from tests.helpers.ranks import run_on_ranks

SHARING = ["sft", "classification", "reward"]  # methods whose ranks can share a batch
METHODS = [*SHARING, "rag", "vlm"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What a method found under a strategy, where each trains once."""
    folder = tmp_path_factory.mktemp("trained")

    @cache
    def found(kind, lora, method):
        return train(kind, lora, folder / f"{kind}-{lora}-{method}", method=method)

    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lora", ["full", "lora"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_equal_one_process(method, kind, lora, trained):
    """The same micro-batches, sharded to two ranks with half the accumulation; the last window is a short one."""
    one, two = trained("one", lora, method), trained(kind, lora, method)
    assert one["ids"] != two["ids"]
    assert_same_training(one, two)


@pytest.mark.slow
def test_compiled_and_recomputed_layers_of_two_ranks_equal_one_process(trained):
    assert_same_training(trained("one", "lora", "sft"), trained("fsdp2-compiled", "lora", "sft"))


@pytest.mark.slow
@pytest.mark.parametrize("method", SHARING)
@pytest.mark.parametrize("lora", ["full", "lora"])
@pytest.mark.parametrize("kind", ["sequence", "tensor"])
def test_two_ranks_that_share_a_batch_equal_one_process(method, lora, kind, trained):
    """The same micro-batches on both ranks, each of which computes half of every row, or of every layer."""
    one, two = trained("one", lora, method), trained(kind, lora, method)
    assert one["ids"] == two["ids"]
    assert_same_training(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lora", ["full", "lora"])
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.exhaustive), 2, 3])
def test_stages_of_zero_equal_one_process(stage, lora, method, trained):
    """DeepSpeed keeps the gradients to itself; their norms are those of one process, and so are the losses."""
    one, two = trained("one", lora, method), trained(f"deepspeed-{stage}", lora, method)
    assert len(two["losses"]) == len(one["losses"]) == (2 if method in SHARING else 1)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["norms"][0] == pytest.approx(one["norms"][0], rel=1e-5)
    assert two["validation"] == pytest.approx(one["validation"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("method", SHARING)
@pytest.mark.parametrize(("kind", "lora"), [("sequence-4", "full"), ("tensor-4", "full"), ("tensor-4", "lora")])
def test_two_groups_of_two_ranks_equal_one_process(kind, lora, method, trained):
    """Each group shares its micro-batches, and the two have different ones."""
    one, four = trained("one", lora, method), trained(kind, lora, method)
    assert one["ids"] != four["ids"]
    assert_same_training(one, four)


def assert_same_training(one, two):
    assert len(one["gradients"]) == len(two["gradients"]) > 0
    for name, gradient in one["gradients"][0].items():
        scale = max(float(gradient.abs().max()), 1e-3)
        torch.testing.assert_close(two["gradients"][0][name], gradient, rtol=1e-5, atol=1e-5 * scale, msg=name)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["norms"][0] == pytest.approx(one["norms"][0], rel=1e-5)
    assert two["validation"] == pytest.approx(one["validation"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_rank_without_an_image_keeps_in_step(kind, tmp_path):
    """Where only one rank has images, the other still takes part in every exchange."""
    train(kind, "full", tmp_path, method="vlm")
    ranks = [torch.load(tmp_path / f"{kind}-all-{rank}.pt")["pictures"] for rank in (0, 1)]
    assert sorted(ranks) == [[False, True], [True, False]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("ddp", "lora"),
        ("fsdp2", "lora"),
        ("fsdp2", "full"),
        ("deepspeed-2", "lora"),
        ("deepspeed-3", "full"),
        ("gathered", "lora"),
        ("fsdp2-async", "full"),
        ("gathered-async", "lora"),
    ],
)
def test_resume_on_two_ranks_sees_the_same_records(kind, lora, tmp_path):
    """Stopped in the middle of the first epoch; each rank continues with its own records.

    `async` saves in the background; under `fsdp2-async` the weights change before their checkpoint is written.
    """
    train(kind, lora, tmp_path, "whole,first,rest")
    assert (tmp_path / "saved.ckpt").is_dir() == kind.startswith(("fsdp2", "deepspeed"))
    for rank in (0, 1):
        whole, first, rest = (torch.load(tmp_path / f"{kind}-{p}-{rank}.pt") for p in ("whole", "first", "rest"))
        assert 0 < len(first["ids"]) < len(whole["ids"]) / 2
        assert first["ids"] + rest["ids"] == whole["ids"]
        assert first["losses"] + rest["losses"] == pytest.approx(whole["losses"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "lora"),
    [
        ("fsdp2", "one", "full"),
        ("one", "fsdp2", "lora"),
        ("gathered", "one", "lora"),
        ("ddp", "fsdp2", "full"),
        ("fsdp2", "ddp", "lora"),
        ("tensor", "one", "full"),
        ("one", "tensor", "lora"),
    ],
)
def test_checkpoint_resumes_on_another_number_of_ranks(before, after, lora, tmp_path):
    """Two ranks with one micro-batch each take the steps of one process that accumulates two."""
    first = train(before, lora, tmp_path, "pairs-whole,pairs-first")
    whole = torch.load(tmp_path / f"{before}-pairs-whole-0.pt")
    rest = train(after, lora, tmp_path, "pairs-rest")
    assert 0 < len(first["losses"]) < len(whole["losses"])
    assert first["losses"] + rest["losses"] == pytest.approx(whole["losses"], rel=1e-4)
    assert first["norms"] + rest["norms"] == pytest.approx(whole["norms"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stored",
    [pytest.param(torch.float32, marks=pytest.mark.exhaustive), torch.bfloat16],
    ids=["float32", "bfloat16"],
)
def test_each_rank_holds_its_shards_alone_while_a_model_is_loaded(stored, tmp_path):
    """Both together need little more than one copy; files are mapped, and belong to no process."""
    base_model_folder(
        tmp_path / "base", stored, hidden_size=512, intermediate_size=2048, num_hidden_layers=24, head_dim=128
    )
    copy = 4 * sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "base").parameters())
    assert copy > 300e6
    for kind in ("one", "fsdp2"):
        run_on_ranks(load, kind, str(tmp_path), ranks=1 if kind == "one" else 2)
    one, *ranks = (torch.load(tmp_path / f"{name}.pt") for name in ("one-0", "fsdp2-0", "fsdp2-1"))
    assert sum(rank["most"] for rank in ranks) < 1.3 * copy
    assert ranks[0]["loss"] == pytest.approx(one["loss"], rel=1e-5)

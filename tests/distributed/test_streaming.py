"""Streamed data on two gloo ranks: the steps are those of one process, and so is what follows a resume."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_alignment.errors import AlignmentError
from tests.helpers import (
    assert_same_gradients,
    chats,
    pairs,
    preference_data,
    preference_module,
    sft_data,
    sft_module,
    step_gradients,
    trainer,
)
from tests.helpers.rank_runs import Recorder, strategy_of
from tests.helpers.ranks import run_on_ranks

METHODS = ["sft", "preferences"]
STREAMED = {"streaming": True, "shuffle_buffer": 8, "tokens_per_batch": 512}
STEPS, SAVED, ACCUMULATE = 4, 2, 2  # a pass of a rank has about three steps


def records_of(method):
    return chats(40) if method == "sft" else pairs(40)


def built(method, **settings):
    module = sft_module(lora=True) if method == "sft" else preference_module(lora=True)
    return module, (sft_data if method == "sft" else preference_data)(module, records_of(method), **settings)


def train_all(folder, kind):
    """Each method whole, stopped, and resumed, one after the other in the same processes."""
    for method in METHODS:
        found = {}
        for part in ("whole", "first", "rest"):
            recorder, path = Recorder(), folder / f"{method}.ckpt"
            saver = ModelCheckpoint(folder, filename=method, enable_version_counter=False, every_n_train_steps=SAVED)
            runner = trainer(
                folder,
                max_epochs=-1,
                max_steps=SAVED if part == "first" else STEPS,
                strategy=strategy_of(kind),
                devices=2,
                accumulate_grad_batches=ACCUMULATE,
                gradient_clip_val=0.1,
                callbacks=[recorder, *([saver] if part == "first" else [])],
                enable_checkpointing=part == "first",
            )
            module, data = built(method, **STREAMED, num_workers=1 if part == "rest" else 0)
            runner.fit(module, data, ckpt_path=path if part == "rest" else None)
            found[part] = {"ids": recorder.ids, "losses": recorder.losses, "norms": recorder.norms}
            found[part] |= {"gradients": recorder.gradients[:1]}
        torch.save(found, folder / f"{method}-{runner.global_rank}.pt")


def fail_together(folder):
    """Train until the record that one rank cannot read, and keep what each says."""
    records = [*chats(12), {"text": "no"}, chats(13)[-1]]  # an even number: in each pass it is the first rank's
    module = sft_module(lora=True)
    data = sft_data(module, records, **STREAMED | {"shuffle_buffer": 1})
    runner = trainer(folder, max_epochs=-1, max_steps=50, strategy=strategy_of("ddp"), devices=2)
    with pytest.raises(AlignmentError) as caught:
        runner.fit(module, data)
    (folder / str(runner.global_rank)).write_text(str(caught.value))


@pytest.mark.slow
def test_rank_that_cannot_read_a_record_ends_all(tmp_path):
    run_on_ranks(fail_together, tmp_path)
    assert "train[12]: field 'messages' is missing" in (tmp_path / "0").read_text()
    assert "another rank cannot go on with its records" in (tmp_path / "1").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero2"])
def test_two_ranks_that_stream_equal_one_process(kind, tmp_path):
    """One large batch of what both ranks saw in their first step gives its gradient; a resume sees the rest."""
    run_on_ranks(train_all, tmp_path, kind)
    for method in METHODS:
        ranks = [torch.load(tmp_path / f"{method}-{rank}.pt") for rank in (0, 1)]
        whole = [rank["whole"] for rank in ranks]
        assert len(whole[0]["ids"]) == len(whole[1]["ids"]) == STEPS * ACCUMULATE
        first = [name.partition("/")[2] for rank in whole for batch in rank["ids"][:ACCUMULATE] for name in batch]
        assert len(set(first)) == len(first) > 2 * ACCUMULATE  # the ranks have different records
        records = {record["id"]: record for record in records_of(method)}
        module, data = built(method, packing=False, batch_size=99)
        data.sources["train"] = [
            type(data.sources["train"][0])(records=[records[name] for name in first], name="train")
        ]
        expected = step_gradients(tmp_path, module, data)
        norm = torch.nn.utils.get_total_norm(expected.values())
        for rank in ranks:
            assert rank["whole"]["norms"][0] == pytest.approx(float(norm), rel=1e-5)
            if kind != "zero2":  # which keeps the gradients to itself
                assert_same_gradients(rank["whole"]["gradients"][0], expected)
            assert rank["first"]["ids"] + rank["rest"]["ids"] == rank["whole"]["ids"]
            assert rank["first"]["losses"] + rank["rest"]["losses"] == pytest.approx(rank["whole"]["losses"], rel=1e-5)

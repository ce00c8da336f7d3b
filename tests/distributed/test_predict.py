"""Predict under a sharded strategy, where ranks have unequal numbers of batches and of tokens."""

import pytest

from lit_alignment import DecodingConfig, FSDP2Strategy, PredictionWriter
from tests.helpers import chats, sft_data, sft_module, trainer
from tests.helpers.ranks import run_on_ranks


def predict(folder, ranks):
    module = sft_module(generation={"greedy": DecodingConfig(max_new_tokens=12)})
    data = sft_data(module, chats(4), chats(5, seed=1), packing=False, batch_size=2)  # 3 batches, of other lengths each
    sharded = {"strategy": FSDP2Strategy(process_group_backend="gloo"), "devices": ranks} if ranks > 1 else {}
    runner = trainer(folder, callbacks=[PredictionWriter(str(folder / f"{ranks}"))], **sharded)
    runner.predict(module, datamodule=data, return_predictions=False)


@pytest.mark.slow
def test_two_ranks_with_unequal_prompts_answer_as_one_process(tmp_path):
    run_on_ranks(predict, tmp_path, 2)
    predict(tmp_path, 1)
    one, two = ((tmp_path / f"{ranks}/greedy.jsonl").read_text() for ranks in (1, 2))
    assert one == two and len(one.splitlines()) == 5

"""Chat records of turbo-alignment are read as they are."""

import pytest

from lit_alignment import SFTDataModule
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.encoding.example import Example
from lit_alignment.data.encoding.messages import read_record
from lit_alignment.data.encoding.templates import TemplateConfig
from lit_alignment.data.sources.records import SourceConfig
from tests.helpers import encoder, table, write_jsonl

TEMPLATE = TemplateConfig(
    prefix="<RS>{role}", suffix="</RS>", role_names={"bot": "BOT", "user": "USER", "system": "SYSTEM"}, append_eos=False
)


def record(*messages, **rest):
    return read_record({"id": 7, "messages": list(messages), **rest}, "old.jsonl:1", 0)


def test_ids_roles_label_meta_and_unknown_keys():
    found = record(
        {"role": "system", "content": "s", "disable_loss": False},
        {"role": "user", "content": "q"},
        {"role": "bot", "content": "a", "disable_loss": True},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "b"},
        label="urgent",
        meta={"k": 1},
        source="somewhere",
        dataset_name="unknown",
    )
    assert found.id == "7" and found.label == "urgent" and found.meta == {"k": 1}
    assert [message["role"] for message in found.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [message.get("train") for message in found.messages] == [None, None, False, None, None]


def test_disable_loss_false_leaves_the_role_to_decide(tokenizer):
    """Its default is written out in many files; a question must not be trained for that."""
    plain = record({"role": "user", "content": "order"}, {"role": "bot", "content": "reply"})
    written = record(
        {"role": "user", "content": "order", "disable_loss": False},
        {"role": "bot", "content": "reply", "disable_loss": False},
    )
    shown = [table(tokenizer, encoder(tokenizer, TEMPLATE).encode(each)) for each in (plain, written)]
    assert shown[0] == shown[1]
    assert "[" in shown[0] and "[order]" not in shown[0]


@pytest.mark.parametrize("number", [1, 2])
def test_disable_loss_takes_a_response_out(tokenizer, number):
    messages = []
    for index in range(2):
        messages += [
            {"role": "user", "content": "order"},
            {"role": "bot", "content": "reply", "disable_loss": index + 1 == number},
        ]
    example = encoder(tokenizer, TEMPLATE).encode(record(*messages))
    once = encoder(tokenizer, TEMPLATE).encode(record(*messages[:1], {"role": "bot", "content": "reply"}))
    assert example.num_trained == once.num_trained


def test_the_data_module_trains_what_was_trained_there(tokenizer, tmp_path):
    """The content and the suffix of each bot message, but for those with disable_loss."""
    tokenizer.add_tokens(["<RS>", "</RS>"])
    messages = [
        {"role": "system", "content": "reply", "disable_loss": False},
        {"role": "user", "content": "order", "disable_loss": False},
        {"role": "bot", "content": "repair", "disable_loss": True},
        {"role": "user", "content": "urgent"},
        {"role": "bot", "content": "billing", "disable_loss": False},
    ]
    path = write_jsonl(tmp_path / "old.jsonl", [{"id": 7, "messages": messages, "source": "a", "label": None}])
    data = SFTDataModule(tokenizer, train=[SourceConfig(path)], encoding=EncodingConfig(TEMPLATE), packing=False)
    data.setup("fit")
    row = data.examples["train"][0]
    assert table(tokenizer, Example(row["input_ids"], row["labels"], row["weights"])) == (
        "<|im_start|> <RS> S Y S T E M re ply </RS> <RS> U S E R order </RS> <RS> B O T repair </RS> "
        "<RS> U S E R urgent </RS> <RS> B O T [billing] [</RS>]"
    )

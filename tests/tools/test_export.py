"""Exporting and merging from every source, checked by the logits, refused where they would differ."""

import json
import shutil

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lit_alignment import Export
from lit_alignment.checkpoints.comparing import Difference, compare
from lit_alignment.checkpoints.restore import restore
from lit_alignment.checkpoints.saved import read_saved
from lit_alignment.errors import CheckpointError, ConfigError
from lit_alignment.models.tokens import NewTokenConfig, TokensConfig
from lit_alignment.tools import export, merge
from tests.helpers import (
    base_model_folder,
    chats,
    pairs,
    reward_data,
    reward_model,
    sft_data,
    trainer,
    write_jsonl,
)
from tests.helpers.adapters import ADAPTERS, PROMPTS, WEIGHTS, fit, logits, module_with
from tests.helpers.commands import command
from tests.helpers.rank_runs import train


@pytest.fixture
def base(tmp_path):
    """A base model whose files are bf16, as those of most published models."""
    return base_model_folder(tmp_path / "base", dtype=torch.bfloat16)


def plain_logits(folder, dtype=torch.float32):
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))


@pytest.mark.parametrize("name", WEIGHTS)
def test_merge_from_a_checkpoint_prints_the_largest_difference(name, base, tmp_path, capsys):
    module = module_with(base, WEIGHTS[name])
    last = fit(tmp_path, module)
    merge.main([last, "--out", str(tmp_path / "out"), "--dtype", "float32"])
    torch.testing.assert_close(plain_logits(tmp_path / "out"), logits(module.network), rtol=1e-4, atol=1e-4)
    out = capsys.readouterr().out
    assert "logits before and after on 4 prompts: largest difference" in out
    assert "same top token at 100.0% of positions" in out and "merged: " in out


def test_merged_weights_are_stored_as_the_base_is_and_rounded_once(base, tmp_path):
    module = module_with(base, WEIGHTS["lora"])
    last = fit(tmp_path, module)
    merge.main([last, "--out", str(tmp_path / "exact"), "--dtype", "float32"])
    merge.main([last, "--out", str(tmp_path / "stored")])
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "exact", dtype=torch.float32).state_dict()
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "stored", dtype="auto")
    assert stored.dtype == torch.bfloat16
    assert all(torch.equal(value, exact[key].bfloat16()) for key, value in stored.state_dict().items())


@pytest.mark.parametrize("name", PROMPTS)
def test_learned_vectors_are_exported_as_adapters_and_not_merged(name, base, tmp_path):
    module = module_with(base, PROMPTS[name])
    last = fit(tmp_path, module)
    export.main([last, "--out", str(tmp_path / "out")])
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(module.network), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="cannot be merged into weights"):
        merge.main([last, "--out", str(tmp_path / "merged")])
    assert not (tmp_path / "merged").exists()


def test_adapter_folder_merges_over_the_base_that_it_names_or_is_given(base, tmp_path):
    module = module_with(base, WEIGHTS["lora"])
    fit(tmp_path, module, callbacks=[Export(form="adapter")])
    adapter = str((tmp_path / "ckpt/export").resolve())
    merge.main([adapter, "--out", str(tmp_path / "out"), "--dtype", "float32"])
    torch.testing.assert_close(plain_logits(tmp_path / "out"), logits(module.network), rtol=1e-4, atol=1e-4)
    moved = tmp_path / "moved"
    shutil.move(base, moved)
    with pytest.raises(ConfigError, match="no such model folder"):
        merge.main([adapter, "--out", str(tmp_path / "again")])
    merge.main([adapter, "--out", str(tmp_path / "again"), "--dtype", "float32", "--base", str(moved)])
    assert torch.equal(plain_logits(tmp_path / "again"), plain_logits(tmp_path / "out"))


def test_new_tokens_are_merged_by_export_and_their_rows_kept(base, tmp_path, capsys):
    tokens = TokensConfig(new={"<best>": NewTokenConfig("text", "order kitchen")}, pad_vocabulary_to=64)
    module = module_with(base, WEIGHTS["lora"], tokens=tokens)
    last = fit(tmp_path, module)
    export.main([last, "--out", str(tmp_path / "out"), "--dtype", "float32"])
    assert "merged, since it holds rows of new tokens" in capsys.readouterr().out
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    index = AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<best>")
    with torch.no_grad():
        live = module.network.get_base_model().get_input_embeddings()(torch.tensor([index]))
    assert torch.equal(plain.get_input_embeddings().weight[index], live[0]) and plain.config.vocab_size == 832
    export.main([last, "--out", str(tmp_path / "alone"), "--form", "adapter"])
    assert (tmp_path / "alone/adapter_config.json").exists()


def test_full_training_is_exported_and_has_nothing_to_merge(base, tmp_path):
    module = module_with(base)
    last = fit(tmp_path, module)
    export.main([last, "--out", str(tmp_path / "out"), "--max-shard-size", "100KB"])
    assert torch.equal(plain_logits(tmp_path / "out"), logits(module.network))
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge.main([last, "--out", str(tmp_path / "merged")])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "kind"), [("fsdp2", "full"), ("fsdp2", "lora"), ("deepspeed-2", "lora"), ("deepspeed-3", "full")]
)
def test_sharded_checkpoint_of_two_ranks_is_exported(strategy, kind, base, tmp_path):
    """Written on two gloo ranks; a plain from_pretrained has the logits of the gathered weights."""
    train(strategy, kind, tmp_path, "sharded")
    assert (tmp_path / "saved.ckpt").is_dir()
    export.main([str(tmp_path / "saved.ckpt"), "--out", str(tmp_path / "out"), "--dtype", "float32"])
    if kind == "lora":
        merge.main([str(tmp_path / "saved.ckpt"), "--out", str(tmp_path / "out"), "--dtype", "float32", "--overwrite"])
    expected = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(plain_logits(tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)
    beside = tmp_path / "saved"  # what the callback wrote, while the model was sharded
    kind_of = AutoPeftModelForCausalLM if kind == "lora" else AutoModelForCausalLM
    torch.testing.assert_close(
        logits(kind_of.from_pretrained(beside, dtype=torch.float32)), expected, rtol=1e-4, atol=1e-4
    )


def test_generation_config_and_template_come_from_the_checkpoint(base, tmp_path):
    last = fit(tmp_path, module_with(base, WEIGHTS["lora"]))
    export.main([last, "--out", str(tmp_path / "out")])
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in written["eos_token_id"]
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template


def test_difference_past_the_tolerance_is_refused_and_nothing_is_written(base, tmp_path):
    last = fit(tmp_path, module_with(base, WEIGHTS["lora"]))
    with pytest.raises(CheckpointError, match=r"not written: .* answers differently .* Try --dtype float32"):
        merge.main([last, "--out", str(tmp_path / "out"), "--dtype", "bfloat16", "--tolerance", "1e-7"])
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_silent_merge_of_quantised_training_is_refused(base, tmp_path):
    last = fit(tmp_path, module_with(base, WEIGHTS["lora"]))
    saved = torch.load(last, weights_only=True)
    saved["lit_alignment"]["backbone"]["quantization"] = "nf4"
    torch.save(saved, last)
    with pytest.raises(ConfigError, match=r"over nf4 weights.*--form adapter, or accept that: --dequantize"):
        merge.main([last, "--out", str(tmp_path / "out")])
    merge.main([last, "--out", str(tmp_path / "out"), "--dequantize"])
    export.main([last, "--out", str(tmp_path / "adapter")])
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()


def test_prompts_of_a_file_are_compared(base, tmp_path, capsys):
    last = fit(tmp_path, module_with(base, WEIGHTS["lora"]))
    records = [*chats(5), {"id": "s", "messages": [{"role": "system", "content": "only"}]}]
    file = write_jsonl(tmp_path / "prompts.jsonl", records)
    export.main([last, "--out", str(tmp_path / "out"), "--prompts", file])
    out = capsys.readouterr().out
    assert "on 5 prompts" in out and "prompts.jsonl:6: not compared (nothing_to_answer)" in out


def test_existing_folder_is_kept_unless_told(base, tmp_path):
    last = fit(tmp_path, module_with(base, WEIGHTS["lora"]))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="exists. Choose another --out, or add --overwrite"):
        export.main([last, "--out", str(tmp_path / "out")])
    assert (tmp_path / "out/mine.txt").read_text() == "keep"
    export.main([last, "--out", str(tmp_path / "out"), "--overwrite"])
    assert not (tmp_path / "out/mine.txt").exists()


@pytest.mark.parametrize("content", [b"nonsense", None])
def test_what_is_no_checkpoint_is_refused(content, tmp_path):
    source = tmp_path / "x.ckpt"
    if content is None:
        torch.save({"state_dict": {}}, source)
    else:
        source.write_bytes(content)
    with pytest.raises(CheckpointError, match="x.ckpt: (no checkpoint|cannot read|not written by lit_alignment)"):
        export.main([str(source), "--out", str(tmp_path / "out")])
    with pytest.raises(CheckpointError, match="nowhere: no such file or folder .* Give a checkpoint"):
        export.main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])


def test_checkpoint_without_a_trained_weight_is_refused(base, tmp_path):
    last = fit(tmp_path, module_with(base, WEIGHTS["lora"]))
    saved = torch.load(last, weights_only=True)
    name = next(iter(saved["state_dict"]))
    del saved["state_dict"][name]
    torch.save(saved, last)
    with pytest.raises(CheckpointError, match=r"lacks 1 trained weights, the first is .*damaged"):
        export.main([last, "--out", str(tmp_path / "out")])


def test_adapters_over_a_random_base_are_refused(tmp_path):
    from tests.helpers import sft_module

    module = sft_module(lora=True)
    saver = ModelCheckpoint(tmp_path / "ckpt")
    trainer(tmp_path, callbacks=[saver], enable_checkpointing=True).fit(module, sft_data(module, chats(4)))
    with pytest.raises(ConfigError, match="was random"):
        export.main([saver.best_model_path, "--out", str(tmp_path / "out")])


def test_difference_is_the_largest_over_all_prompts():
    before = [torch.tensor([[1.0, 2.0], [4.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    after = [torch.tensor([[1.0, 2.5], [4.0, 0.0]]), torch.tensor([[1.0, 0.0]])]
    found = compare(before, after)
    assert found == Difference(largest=1.0, scale=4.0, agreement=2 / 3) and found.share == 0.25


@pytest.mark.slow
def test_command_line_merges_and_says_what_it_did(base, tmp_path):
    last = fit(tmp_path, module_with(base, ADAPTERS["lora"]))
    result = command("merge", last, "--out", str(tmp_path / "out"))
    assert result.returncode == 0 and "merged: " in result.stdout and result.stderr == ""
    missing = command("export", str(tmp_path / "no.ckpt"), "--out", str(tmp_path / "x"))
    assert missing.returncode == 2 and "no such file or folder" in missing.stderr


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_scores_of_a_head_are_compared_and_kept(form, base, tmp_path, capsys):
    module = reward_model(base, lora=True)
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="x")
    data = reward_data(module, pairs(4), pairs(4))
    trainer(tmp_path, callbacks=[saver], enable_checkpointing=True).fit(module, data)
    out = tmp_path / "out"
    export.main([str(tmp_path / "ckpt/x.ckpt"), "--out", str(out), "--form", form, "--dtype", "float32"])
    assert "scores before and after on 4 prompts: largest difference" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["reward_std"] == module.head.measured["reward_std"]
    network, tokenizer = restore(read_saved(out)) if form == "adapter" else plain_classifier(out)
    ids = torch.tensor([tokenizer("please repair the scale")["input_ids"]])
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(network(input_ids=ids).logits, module.network(input_ids=ids).logits)
    if form == "adapter":  # and merged later, from the folder alone
        merge.main([str(out), "--out", str(tmp_path / "late"), "--dtype", "float32"])
        assert json.loads((tmp_path / "late/config.json").read_text())["id2label"] == {"0": "reward"}


def plain_classifier(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def test_overwrite_replaces_exports_alone(base, tmp_path, monkeypatch):
    last = fit(tmp_path, module_with(base, WEIGHTS["lora"]))
    mine, link = tmp_path / "mine", tmp_path / "link"
    mine.mkdir()
    (mine / "thesis.docx").write_text("years of work")
    link.symlink_to(mine)
    for target, message in (
        (mine, "holds thesis.docx, which no export has written"),
        (link, "is a link or a file"),
        (tmp_path / "ckpt", "holds what is exported"),
        (tmp_path, "holds what is exported"),
    ):
        with pytest.raises(ConfigError, match=message):
            export.main([last, "--out", str(target), "--overwrite"])
    with pytest.raises(ConfigError, match="holds what is exported"):
        export.main([last, "--base", base, "--out", base, "--overwrite"])
    assert (mine / "thesis.docx").exists()

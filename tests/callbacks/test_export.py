"""Folders that plain transformers and peft load."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lit_alignment import Export
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.encoding.templates import TemplateConfig
from lit_alignment.errors import ConfigError
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.modules.sft import SFTModule
from lit_alignment.optimization import OptimizerConfig
from tests.helpers import ROOT, base_model_folder, chats, sft_data, sft_module, trainer

FIXTURE = [{"role": "user", "content": "Where is my order?\n  Né 42"}, {"role": "assistant", "content": "  here "}]


def fit(folder, module, export=None, **data):
    saver = ModelCheckpoint(folder / "ckpt", monitor="val/loss", save_top_k=2)
    callbacks = [export or Export(), saver]
    runner = trainer(folder, callbacks=callbacks, enable_checkpointing=True, max_epochs=3)
    runner.fit(module, sft_data(module, chats(8), chats(4), **data))
    return saver


@pytest.fixture
def base(tmp_path):
    """A folder with a real base model, as adapters need one."""
    return base_model_folder(tmp_path / "base")


def lora_module(base):
    peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return SFTModule(
        BackboneConfig(base), peft, optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup=0)
    )


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits


def live_logits_at(module, checkpoint):
    module.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"], strict=False)
    return logits(module.model)


def test_full_export_loads_with_equal_logits(tmp_path):
    module = sft_module()
    saver = fit(tmp_path, module)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ckpt/export")
    torch.testing.assert_close(logits(model), live_logits_at(module, saver.best_model_path), rtol=1e-5, atol=1e-5)


def test_adapter_export_loads_with_equal_logits(tmp_path, base):
    module = lora_module(base)
    saver = fit(tmp_path, module)
    folder = tmp_path / "ckpt/export"
    assert (folder / "adapter_model.safetensors").stat().st_size < 200_000
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(model), live_logits_at(module, saver.best_model_path), rtol=1e-5, atol=1e-5)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == base


def test_merged_export_loads_with_equal_logits(tmp_path, base):
    module = lora_module(base)
    saver = fit(tmp_path, module, Export(form="merged"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ckpt/export")
    assert not list((tmp_path / "ckpt/export").glob("adapter*"))
    torch.testing.assert_close(logits(model), live_logits_at(module, saver.best_model_path), rtol=1e-4, atol=1e-4)


def test_link_points_to_the_best_and_no_partial_folder_stays(tmp_path):
    saver = fit(tmp_path, sft_module())
    link = tmp_path / "ckpt/export"
    assert link.is_symlink() and link.resolve().name + ".ckpt" == saver.best_model_path.rsplit("/")[-1]
    folders = {path.name for path in (tmp_path / "ckpt").iterdir() if path.is_dir()}
    assert folders == {"export", link.resolve().name}


def test_every_kept_checkpoint_is_exported_on_request(tmp_path):
    saver = fit(tmp_path, sft_module(), Export(which="kept"))
    folders = {str(p) + ".ckpt" for p in (tmp_path / "ckpt").iterdir() if p.is_dir() and not p.is_symlink()}
    assert folders == set(saver.best_k_models) and len(folders) == 2


def test_saved_tokenizer_and_template_encode_as_before(tmp_path):
    module = sft_module()
    before = module.tokenizer.apply_chat_template(FIXTURE, tokenize=True, return_dict=False)
    fit(tmp_path, module)
    after = AutoTokenizer.from_pretrained(tmp_path / "ckpt/export")
    assert after.apply_chat_template(FIXTURE, tokenize=True, return_dict=False) == before
    assert after.pad_token_id == module.tokenizer.pad_token_id


def test_templates_by_name_are_exported_all_and_encode_as_before(tmp_path):
    module = sft_module()
    plain = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    module.tokenizer.chat_template = {"default": plain, "tool_use": "{{ tools | tojson }}" + plain}
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    before = [module.tokenizer.apply_chat_template(FIXTURE, tools=given, return_dict=False) for given in (None, tools)]
    fit(tmp_path, module)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "ckpt/export")
    after = [loaded.apply_chat_template(FIXTURE, tools=given, return_dict=False) for given in (None, tools)]
    assert loaded.chat_template == module.tokenizer.chat_template and after == before and before[0] != before[1]


def test_template_file_used_in_training_is_what_the_export_carries(tmp_path):
    file = ROOT / "tests/data/encoding/templates/plain.jinja"
    module = sft_module()
    fit(tmp_path, module, encoding=EncodingConfig(template=TemplateConfig(file=str(file)), max_length=512))
    loaded = AutoTokenizer.from_pretrained(tmp_path / "ckpt/export")
    text = loaded.apply_chat_template(FIXTURE, tokenize=False)
    assert text == "### Question:\nWhere is my order?\n  Né 42\n\n### Answer:\n  here \n\n"


def test_generation_config_stops_at_the_trained_end_of_turn(tmp_path):
    fit(tmp_path, sft_module())
    loaded = GenerationConfig.from_pretrained(tmp_path / "ckpt/export")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ckpt/export")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in loaded.eos_token_id
    assert loaded.pad_token_id == tokenizer.pad_token_id


@pytest.mark.slow
def test_exported_model_stops_by_itself(tmp_path):
    """Overfitted on short answers, the folder alone must generate one and stop."""
    records = [{"id": "a", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]}]
    module = sft_module()
    saver = ModelCheckpoint(tmp_path / "ckpt")
    runner = trainer(tmp_path, callbacks=[Export(), saver], enable_checkpointing=True, max_epochs=40)
    runner.fit(module, sft_data(module, records))
    folder = tmp_path / "ckpt/export"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        records[0]["messages"][:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=30)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "yes<|im_end|>"


def test_export_without_checkpoints_is_refused(tmp_path):
    module = sft_module()
    with pytest.raises(ConfigError, match="Export callback needs checkpoints"):
        trainer(tmp_path, callbacks=[Export()]).fit(module, sft_data(module, chats(2)))


@pytest.mark.parametrize("which", ["best", "kept"])
def test_best_checkpoint_is_exported_where_the_last_one_is_another(which, tmp_path):
    """The loss falls, and the highest is asked for: the best checkpoint is the first."""
    module = sft_module()
    saver = ModelCheckpoint(tmp_path / "ckpt", monitor="val/loss", mode="max", save_top_k=2, save_last=True)
    runner = trainer(tmp_path, callbacks=[Export(which), saver], enable_checkpointing=True, max_epochs=3)
    runner.fit(module, sft_data(module, chats(8), chats(4)))
    last = logits(module.model).clone()
    link = tmp_path / "ckpt/export"
    assert str(link.resolve().with_suffix(".ckpt")) == saver.best_model_path
    model = AutoModelForCausalLM.from_pretrained(link)
    best = live_logits_at(module, saver.best_model_path)
    assert float((best - last).abs().max()) > 1e-2
    torch.testing.assert_close(logits(model), best, rtol=1e-5, atol=1e-5)

"""Folders that plain transformers and peft load."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from peft import AutoPeftModelForCausalLM, LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lit_alignment import Export
from lit_alignment.callbacks.export import export_checkpoint
from lit_alignment.checkpoints.hf_folder import Companions, write_folder
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.encoding.templates import TemplateConfig
from lit_alignment.errors import CheckpointError, ConfigError
from lit_alignment.models.adapters import add_adapters, save_adapter
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.models.tokens import NewTokenConfig, TokensConfig
from lit_alignment.modules.sft import SFTModule
from lit_alignment.optimization import OptimizerConfig
from tests.helpers import DECODER_SIZE, ROOT, base_model_folder, chats, sft_data, sft_module, trainer

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


def test_merging_over_quantised_weights_is_refused_before_training(tmp_path, base):
    module = lora_module(base)
    module.backbone = replace(module.backbone, quantization="nf4")
    with pytest.raises(ConfigError, match=r"Export: .* over nf4 ones is another model.*--dequantize"):
        fit(tmp_path, module, Export(form="merged"))


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


UNTYING = [
    {"target_modules": ["embed_tokens"]},
    {"target_modules": ["lm_head", "q_proj"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", UNTYING, ids=str)
@pytest.mark.parametrize("form", ["merged", "auto"])
def test_tied_embeddings_of_which_one_was_trained_are_exported_untied(tmp_path, settings, form):
    path = base_model_folder(tmp_path / "base", tie_word_embeddings=True)
    usual = OptimizerConfig(learning_rate=1e-1, schedule="constant", warmup=0)
    module = SFTModule(BackboneConfig(path), LoraConfig(r=4, task_type="CAUSAL_LM", **settings), optimizer=usual)
    saver = fit(tmp_path, module, Export(form=form))
    folder = tmp_path / "ckpt/export"
    is_adapter = (folder / "adapter_config.json").exists()
    model = (AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM).from_pretrained(folder)
    live = live_logits_at(module, saver.best_model_path)
    assert (logits(model) - live).abs().max() < 1e-4 * live.abs().max()
    if not is_adapter:
        assert not model.config.tie_word_embeddings
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert (embedding - head).abs().max() > 0.01
    assert module.network.base_model.model.config.tie_word_embeddings  # the model's own stays as it is


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_adapters_of_experts_are_merged_exactly(tmp_path, kind):
    torch.manual_seed(0)
    experts = {"num_local_experts": 4} if kind == "mixtral" else {"num_experts": 4, "moe_intermediate_size": 16}
    config = AutoConfig.for_model(kind, **(DECODER_SIZE | experts | {"num_experts_per_tok": 2}))
    network = add_adapters(AutoModelForCausalLM.from_config(config), LoraConfig(r=4, target_modules="all-linear"), {})
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter) * parameter.requires_grad
    companions = Companions(AutoTokenizer.from_pretrained(ROOT / "configs/tiny"), None)
    folder = write_folder(network, {}, tmp_path / "out", companions, "merged")
    expected, found = logits(network), logits(AutoModelForCausalLM.from_pretrained(folder))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert {name.rpartition(".")[2] for name, m in network.named_modules() if isinstance(m, ParamWrapper)}


def test_export_that_answers_differently_is_refused_and_the_last_one_stays(tmp_path, base, monkeypatch):
    module = lora_module(base)
    saver = fit(tmp_path, module)
    before = sorted((path, path.read_bytes()) for path in (tmp_path / "ckpt/export/").resolve().iterdir())

    def spoil(network, folder):
        save_adapter(network, folder)
        file = folder / "adapter_model.safetensors"
        save_file({name: value * 1.5 for name, value in load_file(file).items()}, file)

    monkeypatch.setattr("lit_alignment.checkpoints.hf_folder.save_adapter", spoil)
    target = (tmp_path / "ckpt/export").resolve()
    with pytest.raises(CheckpointError, match="not written: the exported model answers differently"):
        export_checkpoint(module, Path(saver.best_model_path), target)
    assert sorted((path, path.read_bytes()) for path in target.iterdir()) == before
    assert not list(target.parent.glob(".*"))


def test_pissa_with_new_tokens_is_exported(tmp_path, base):
    tokens = TokensConfig(new={"<new>": NewTokenConfig()})
    peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="pissa")
    usual = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup=0)
    for form in ("auto", "adapter"):
        module = SFTModule(BackboneConfig(base), peft, tokens=tokens, optimizer=usual)
        fit(tmp_path / form, module, Export(form=form))  # which compares it
        names = {path.name for path in (tmp_path / form / "ckpt/export/").resolve().iterdir()}
        assert ("adapter_model.safetensors" in names) == (form == "adapter")


@pytest.mark.slow
def test_resumed_run_leaves_the_folders_of_the_run_before(tmp_path, base):
    def run(folder, resume=None, epochs=2):
        saver = ModelCheckpoint(folder / "ckpt", monitor="val/loss")
        module = lora_module(base)
        runner = trainer(folder, callbacks=[Export(), saver], enable_checkpointing=True, max_epochs=epochs)
        runner.fit(module, sft_data(module, chats(8), chats(4)), ckpt_path=resume)
        return saver

    first = run(tmp_path / "one")
    before = {path.name for path in (tmp_path / "one/ckpt").iterdir()}
    second = run(tmp_path / "two", first.best_model_path, epochs=4)
    assert {path.name for path in (tmp_path / "one/ckpt").iterdir()} == before
    assert (tmp_path / "one/ckpt/export").resolve().is_dir() and (tmp_path / "two/ckpt/export").resolve().is_dir()
    # In the same folder, the resumed run replaces what it has made itself.
    third = run(tmp_path / "two", second.best_model_path, epochs=6)
    folders = [path for path in (tmp_path / "two/ckpt").iterdir() if path.is_dir() and not path.is_symlink()]
    assert [str(path) + ".ckpt" for path in folders] == [third.best_model_path]


def test_best_is_that_of_the_callback_with_a_metric(tmp_path, base):
    every = ModelCheckpoint(tmp_path / "ckpt", "every-{step}", every_n_train_steps=1)
    best = ModelCheckpoint(tmp_path / "ckpt", "best-{step}", "val/loss", mode="max")  # the first
    module = lora_module(base)
    runner = trainer(tmp_path, callbacks=[every, best, Export()], enable_checkpointing=True, max_epochs=3)
    runner.fit(module, sft_data(module, chats(8), chats(4), packing=False))
    assert str((tmp_path / "ckpt/export").resolve()) + ".ckpt" == best.best_model_path
    assert [path.name for path in (tmp_path / "ckpt").iterdir() if path.is_dir()].count("export") == 1
    assert len([path for path in (tmp_path / "ckpt").iterdir() if path.is_dir() and not path.is_symlink()]) == 1


def test_link_stands_beside_the_checkpoints_where_their_names_make_folders(tmp_path, base):
    saver = ModelCheckpoint(tmp_path / "ckpt", "{epoch}-{val/loss:.2f}", "val/loss", save_top_k=1)
    module = lora_module(base)
    runner = trainer(tmp_path, callbacks=[Export(), saver], enable_checkpointing=True, max_epochs=3)
    runner.fit(module, sft_data(module, chats(8), chats(4)))
    link = tmp_path / "ckpt/export"
    assert (link / "adapter_config.json").is_file() and link.is_symlink()
    assert str(link.resolve()) + ".ckpt" == saver.best_model_path
    assert [path for path in (tmp_path / "ckpt").rglob("*") if path.is_symlink()] == [link]


def test_exports_of_removed_checkpoints_go_where_their_folder_is_relative(tmp_path):
    """As the logger of a command gives it; a resumed run has the best one's path as a whole."""
    runs = os.path.relpath(tmp_path)
    folder = Path(runs, "n/version_0/checkpoints")
    (folder / "mine").mkdir(parents=True)
    saver, export, module = ModelCheckpoint(filename="{step}", monitor="val/loss"), Export(), sft_module()
    logger = CSVLogger(runs, name="n", version=0)
    runner = trainer(tmp_path, callbacks=[export, saver], enable_checkpointing=True, max_epochs=3, logger=logger)
    runner.fit(module, sft_data(module, chats(8), chats(4), packing=False))
    best = Path(saver.best_model_path)
    assert saver.dirpath == str(folder) and best == folder / "step=3.ckpt"

    def exports():
        return {path.name for path in folder.iterdir() if path.is_dir() and not path.is_symlink()}

    assert exports() == {"mine", best.stem} and (folder / "export").resolve() == best.resolve().with_suffix("")
    resumed = Export()
    resumed.load_state_dict(export.state_dict())
    saver.best_model_path, saver.best_k_models = os.path.abspath(best), {}
    resumed.on_fit_end(runner, module)
    assert exports() == {"mine", best.stem} and (folder / "export").resolve() == best.resolve().with_suffix("")

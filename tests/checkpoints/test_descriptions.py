"""JSON beside weights, as an export or a model of the hub has it, in which something has the wrong form."""

import json
import shutil

import pytest

from lit_alignment.cli import main
from lit_alignment.models.adapters import save_adapter
from tests.helpers import base_model_folder
from tests.helpers.adapters import WEIGHTS, module_with


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, and an adapter over it as an export writes one."""
    folder = tmp_path_factory.mktemp("folders")
    module = module_with(base_model_folder(folder / "base"), WEIGHTS["lora"])
    save_adapter(module.load_model(), folder / "adapter")
    module.tokenizer.save_pretrained(folder / "adapter")
    (folder / "adapter/generation_config.json").write_text('{"eos_token_id": 2}')
    return folder


@pytest.mark.parametrize(
    ("file", "value", "says"),
    [
        *(("adapter/generation_config.json", value, "it holds a") for value in ([], 5, None, "x")),
        ("adapter/generation_config.json", {"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ("adapter/generation_config.json", {"compile_config": 5}, "compile_config is 5"),
        ("adapter/generation_config.json", {"early_stopping": [], "num_beams": 2}, "not a generation configuration"),
        ("adapter/tokenizer_config.json", [], "it holds a list"),
        ("adapter/tokenizer_config.json", {"tokenizer_class": 5}, "tokenizer_class is 5"),
        ("adapter/tokenizer_config.json", {"added_tokens_decoder": {"x": 5}}, "added_tokens_decoder is {'x': 5}"),
        ("adapter/tokenizer.json", 5, "it holds a int"),
        ("adapter/adapter_config.json", {"r": "x"}, "Check its adapter_config.json"),
        ("base/config.json", [], "it holds a list"),
        ("base/config.json", {"model_type": []}, "model_type is []"),
        ("base/config.json", {"id2label": 5}, "id2label is 5"),
        ("base/config.json", {"quantization_config": 5}, "quantization_config is 5"),
        ("base/config.json", {"vocab_size": "x"}, "field 'vocab_size'"),
        ("base/config.json", {"layer_types": 5}, "layer_types is 5"),
        ("base/generation_config.json", [], "it holds a list"),
    ],
)
def test_a_description_of_the_wrong_form_is_one_message_with_file_and_field(
    folders, tmp_path, capsys, file, value, says
):
    for name in ("base", "adapter"):
        shutil.copytree(folders / name, tmp_path / name)
    whole = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps(whole | value if isinstance(value, dict) else value))
    command = ["export", str(tmp_path / "adapter"), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}/{file.split('/')[0]}" in error and says in error and error.count("error:") == 1


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
def test_a_training_names_the_damaged_file_of_its_adapter(folders, tmp_path, capsys, name):
    shutil.copytree(folders / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / name).write_text("5")
    common = ["fit", "--config", "configs/sft/tiny.yaml", f"--trainer.default_root_dir={tmp_path}", "--model.peft=null"]
    backbone = [f"--model.backbone.path={folders / 'base'}", "--model.backbone.weights=pretrained"]
    assert main([*common, *backbone, f"--model.adapter.path={tmp_path / 'adapter'}"]) == 2
    assert f"adapter/{name}: not a" in capsys.readouterr().err

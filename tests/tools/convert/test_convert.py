"""What the conversion says, and that nothing is dropped without a word."""

import copy
import json
import re
from pathlib import Path

import pytest
import yaml

from lit_alignment.errors import ConfigError
from lit_alignment.evaluation.answers import build_metric
from lit_alignment.tools.convert import (
    chat,
    classification,
    fit,
    generation,
    inference,
    main,
    merge,
    model,
    multimodal,
    preference,
    reward,
    sampling,
    trainer,
)
from lit_alignment.tools.convert import convert as convert_settings
from lit_alignment.tools.convert.document import Document
from lit_alignment.tools.convert.generation import METRICS
from lit_alignment.tools.convert.kinds import kind_of
from lit_alignment.tools.convert.settings import Notes, Settings
from lit_alignment.trainer_cli import AlignmentCLI, build
from tests.helpers import ROOT

CONFIGS = ROOT / "tests/tools/convert/configs"
SFT = ["sft_lora", "sft_full", "sft_prefix", "sft_prompt", "sft_p_tuning", "sft_adapter", "sft_peft_config"]
SCORED = ["classification", "rm", "inference_classification", "inference_rm", "sampling_rm", "sampling_rso"]
PREFERENCES = ["dpo", "kto", "ddpo"]
SCRIPTS = ["merge", "sampling_random", "preprocess"]
CONVERTED = [
    *SFT,
    "rag",
    "inference_rag",
    "multimodal",
    "inference_multimodal",
    "inference_chat",
    "inference_vllm",
    *SCORED,
    *PREFERENCES,
    *SCRIPTS,
]


def old(name):
    return json.loads((CONFIGS / f"{name}.json").read_text())


def converted(tmp_path, capsys, values, *options):
    """Texts of the written files, stdout and stderr."""
    source = tmp_path / "old.json"
    source.write_text(json.dumps(values))
    capsys.readouterr()
    main([str(source), "--overwrite", *options])
    said = capsys.readouterr()
    files = sorted(path for path in tmp_path.iterdir() if path.suffix in (".yaml", ".sh"))
    return [path.read_text() for path in files], said.out, said.err


@pytest.fixture
def convert(tmp_path, capsys):
    return lambda values, *options: converted(tmp_path, capsys, values, *options)


@pytest.mark.parametrize("name", [name for name in CONVERTED if name not in SCRIPTS])
@pytest.mark.slow
def test_converted_yaml_parses(name, convert, tmp_path, monkeypatch):
    convert(old(name))
    monkeypatch.setattr(AlignmentCLI, "instantiate_classes", lambda self: None)
    for path in tmp_path.glob("*.yaml"):
        config = build(["--config", str(path)]).config
        method = "Classification" if "classification" in name else "Reward" if name in SCORED else "SFT"
        method = "RAG" if "rag" in name else "VLM" if "multimodal" in name else method
        method = "Preference" if name in PREFERENCES else method
        assert config.model.class_path == f"lit_alignment.{method}Module"
        assert config.data.class_path == f"lit_alignment.{method}DataModule"


@pytest.mark.parametrize("name", CONVERTED)
def test_no_key_is_unknown_and_each_note_stands_once_in_both_places(name, convert):
    texts, _, err = convert(old(name))
    lines = err.splitlines()
    assert lines and len(lines) == len(set(lines)) and "unknown key" not in err
    reasons = [line.partition(": ")[2].partition(": ")[2] for line in lines]
    assert len(reasons) == len(set(reasons))
    head = " ".join("\n".join(texts).replace("#   ", " ").split())
    for line in lines:
        assert head.count(" ".join(line.partition(": ")[2].split())) == len(texts), line


FAULTS = {
    chat.IDS: ["sft_lora", "sft_full", "inference_chat"],
    chat.DRAW: ["sft_lora", "inference_chat"],
    chat.RATE: ["sft_full"],
    chat.JSONL: ["sft_full"],
    chat.EXACT: ["sft_lora", "sft_full", "inference_vllm"],
    chat.TOO_LONG: ["sft_lora", "inference_vllm"],
    chat.KEEP_END: ["sft_lora", "sft_adapter"],
    chat.REATTACH: ["sft_lora", "sft_adapter"],
    chat.LAST_REPLICA: ["sft_adapter"],
    chat.PREFIX_SEARCH: ["sft_full"],
    chat.RANDOM_CUT: ["sft_lora", "inference_chat"],
    chat.EOS: ["sft_lora"],
    model.FIRST_PIECE: ["sft_lora", "sft_full"],
    model.BOTH_TABLES: ["sft_lora", "sft_full"],
    model.LIGER: ["sft_lora"],
    model.NO_LENGTH: ["sft_prefix"],
    model.NO_ROWS: ["sft_prompt"],
    model.INIT_TEXT: ["sft_prompt"],
    model.NO_WIDTH: ["sft_p_tuning"],
    trainer.FP16_BFLOAT16: ["sft_full"],
    trainer.RESUME: SFT,
    trainer.UPLOAD: ["sft_lora"],
    generation.FIRST_TOKEN: ["sft_lora"],
    generation.MISASSIGNED: ["sft_lora", "inference_chat", "inference_vllm"],
    generation.PIECES: ["inference_vllm"],
    generation.META: ["inference_vllm"],
    generation.BEST_OF: ["inference_vllm"],
    generation.TABLES: ["sft_lora", "sft_adapter"],
    inference.ONE_ANSWER: ["inference_chat"],
    inference.FOLLOWS: ["inference_vllm"],
    inference.OVERWRITTEN: ["inference_classification"],
    classification.SINGLE: ["classification"],
    classification.FOCAL: ["classification"],
    classification.BALANCED: ["classification"],
    fit.NOISE: ["classification"],
    fit.SMOOTHING: ["rm", "dpo"],
    reward.WINDOWS: ["rm", "dpo", "ddpo"],
    reward.REJECTED: ["rm"],
    chat.NO_LABELS: ["classification", "rm", "inference_rm"],
    chat.RESPONSE_ALONE: ["kto"],
    preference.DROPOUT: PREFERENCES,
    preference.METRICS: PREFERENCES,
    preference.LABELS: ["dpo"],
    preference.PADDED: ["dpo"],
    preference.SYNC: ["dpo"],
    preference.SFT_MODEL: ["dpo"],
    preference.SYNC_OFF: ["kto"],
    preference.SHUFFLED: ["kto"],
    preference.KTO_Z: ["kto"],
    preference.KTO_CONTEXT: ["kto"],
    preference.REWARD_MODEL: ["ddpo"],
    preference.OVERFLOW: ["ddpo"],
    preference.CACHED: ["ddpo"],
    sampling.RSO: ["sampling_rso"],
    sampling.ALL_KEPT: ["sampling_rm"],
    sampling.ONE_SOURCE: ["sampling_rm"],
    sampling.UNSEEDED: ["sampling_random"],
    merge.LAYER: ["merge"],
}
QUIET = {
    chat.REATTACH: ["sft_full", "inference_chat"],
    chat.LAST_REPLICA: ["sft_lora"],
    chat.PREFIX_SEARCH: ["sft_lora"],
    chat.RATE: ["sft_lora"],
    model.LIGER: ["sft_full"],
    trainer.FP16_BFLOAT16: ["sft_lora", "sft_adapter"],
    trainer.UPLOAD: ["sft_full"],
    generation.PIECES: ["inference_chat"],
    preference.CACHED: ["dpo", "kto"],
    preference.SYNC_OFF: ["dpo"],
    reward.WINDOWS: ["kto"],
}


@pytest.mark.parametrize("name", CONVERTED)
def test_each_fault_is_told_where_it_matters_and_once(name, convert):
    err = convert(old(name))[2]
    for text, names in FAULTS.items():
        if name in names:
            assert err.count(f": {text}\n") == 1, text
    for text, names in QUIET.items():
        if name in names:
            assert text not in err


def objects(value, path=""):
    """Each object in a configuration with its path."""
    if isinstance(value, dict):
        yield path, value
        for key, below in value.items():
            yield from objects(below, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from objects(below, f"{path}[{index}]")


def owners(path):
    """A path and those above it, each also as it stands in a line for several places of a list."""
    while path:
        yield from {path, re.sub(r"\[\d+\]", "[*]", path)}
        path = path[: max(path.rfind("."), path.rfind("["), 0)]


@pytest.mark.parametrize("name", CONVERTED)
def test_a_key_added_anywhere_is_reported(name, convert):
    """It is unknown, or part of a mapping that is carried over, or its owner is listed as not carried over."""
    for place, _ in objects(old(name)):
        changed = copy.deepcopy(old(name))
        dict(objects(changed))[place]["strange_key"] = "strange"
        texts, _, err = convert(changed)
        full = f"{place}.strange_key" if place else "strange_key"
        listed = f"unknown key: {full}\n" in err
        carried = any("strange_key: strange" in text or "strange_key:\n" in text for text in texts)
        left = [line for line in err.splitlines() if line.startswith("not carried over")]
        whole = any(f" {owner}{end}" in line for owner in owners(full) for end in ":, " for line in left)
        assert listed or carried or whole, full


def test_every_file_has_an_expectation():
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(CONVERTED)


def test_images_enter_as_they_did_there(convert):
    text = convert(old("multimodal"))[0][0]
    image = yaml.safe_load(text)["model"]["init_args"]["image"]
    projector = {"kind": "c_abstractor", "num_tokens": 49, "weights": "models/projector.safetensors"}
    assert image == {
        "encoders": [{"path": "models/clip"}],
        "projector": projector,
        "token": "<img>",
        "start": "<MS>",
        "end": "</MS>",
    }
    assert "a pickled file is not loaded" in convert(old("inference_multimodal"))[2]


def test_encoders_and_projectors_of_an_inference_may_stand_beside_its_model(convert):
    values = old("inference_multimodal")
    among = yaml.safe_load(convert(values)[0][0])
    (entry,) = values["inference_settings"]
    for key in ("modality_encoder_settings_mapping", "modality_projector_mapping"):
        entry[key] = entry["model_settings"].pop(key)
    entry["metric_settings"] = []
    (text,), _, err = convert(values)
    assert yaml.safe_load(text) == among
    assert "unknown key" not in err and f"inference_settings[0].metric_settings: {multimodal.MEASURED}" in err


def test_a_reader_is_named_alone_or_with_its_settings(convert):
    values = old("preprocess")
    script = convert(values)[0][0].splitlines()[-1]
    del values["reader_settings"]
    texts, _, err = convert(values | {"reader": "clip"})
    assert texts[0].splitlines()[-1] == script
    assert "unknown key" not in err and f"not carried over: reader: {multimodal.READER}" in err


def test_preprocessing_is_a_command_line(convert):
    line = convert(old("preprocess"))[0][0].splitlines()[-1]
    command = "lit-alignment preprocess --encoder models/clip --files images --out features"
    assert line == f"{command} --modality image --batch-size 256"


def test_kind_can_be_given(convert, tmp_path):
    assert convert(old("merge"), "--kind", "merge")[0] == convert(old("merge"))[0]
    with pytest.raises(ConfigError, match="do not tell which command"):
        kind_of({"a": 1}, CONFIGS / "x.json")
    with pytest.raises(ConfigError, match="missing: modality_encoder_settings_mapping"):
        main([str(CONFIGS / "sft_lora.json"), "--kind", "train_multimodal", "--out", str(tmp_path / "new.yaml")])


def test_broken_json_gives_file_and_line(tmp_path):
    path = tmp_path / "old.json"
    path.write_text('{\n  "seed": 1,\n  oops\n}')
    with pytest.raises(ConfigError, match=r"old\.json:3: not valid JSON"):
        main([str(path)])
    path.write_text("[]")
    with pytest.raises(ConfigError, match="holds no object"):
        main([str(path)])
    with pytest.raises(ConfigError, match="no such file"):
        main([str(tmp_path / "none.json")])


def test_all_missing_settings_are_named_at_once(tmp_path):
    values = old("sft_lora")
    del values["model_settings"]["model_path"], values["val_dataset_settings"]
    del values["train_dataset_settings"]["prompt_template"]["suffix_template"]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError) as caught:
        main([str(path)])
    for name in ("model_settings.model_path", "val_dataset_settings", "prompt_template.suffix_template"):
        assert name in str(caught.value)
    assert not path.with_suffix(".yaml").exists()


@pytest.mark.parametrize("name", CONVERTED)
@pytest.mark.parametrize("value", [None, -5, "text", [], [5], {}, True], ids=repr)
def test_a_wrong_value_anywhere_gives_a_conversion_or_one_message(name, value):
    for place, owner in objects(old(name)):
        for key in owner:
            changed = copy.deepcopy(old(name))
            dict(objects(changed))[place][key] = value
            try:
                convert_settings(Settings(changed, "", Notes()), kind_of(changed, CONFIGS / f"{name}.json"))
            except ConfigError as error:
                assert len(str(error).splitlines()) == 1


def test_files_are_not_replaced_unasked(tmp_path):
    target = tmp_path / "new.yaml"
    target.write_text("mine")
    with pytest.raises(ConfigError, match=r"new\.yaml exists"):
        main([str(CONFIGS / "sft_lora.json"), "--out", str(target)])
    assert target.read_text() == "mine"


def test_a_place_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "file/new.yaml", tmp_path / "folder"):
        with pytest.raises(ConfigError, match="cannot be written"):
            main([str(CONFIGS / "sft_lora.json"), "--out", str(target), "--overwrite"])


def test_last_line_is_the_command(convert, tmp_path):
    out = convert(old("sft_lora"))[1]
    assert out.splitlines()[-1].endswith(f"lit-alignment fit --config {tmp_path / 'old.yaml'}")
    out = convert(old("inference_chat"))[1]
    assert [line.rpartition("/")[2] for line in out.splitlines()] == ["old.0.yaml", "old.1.yaml"]
    out = convert(old("merge"))[1]
    assert out.endswith(f"sh {tmp_path / 'old.sh'}\n")


def test_merge_is_a_command_line(convert):
    texts = convert(old("merge"))[0]
    line = texts[0].splitlines()[-1]
    assert line == ("lit-alignment merge 'models/my adapter' --base models/llama --out merged --max-shard-size 200MB")


def test_bucket_and_host_come_from_the_environment(convert, monkeypatch):
    assert "s3://BUCKET/experiments/sft" in convert(old("sft_lora"))[0][0]
    monkeypatch.setenv("S3_CHECKPOINTS_BUCKET", "mine")
    monkeypatch.setenv("S3_CHECKPOINTS_HOST", "https://s3.example")
    text = convert(old("sft_lora"))[0][0]
    assert "url: s3://mine/experiments/sft" in text and "endpoint_url: https://s3.example" in text


def ours(convert, values):
    """The converted configuration, and what was said about it."""
    texts, _, err = convert(values)
    return yaml.safe_load(texts[0]), err


def changed(name, **settings):
    """A configuration with other settings of its trainer and model."""
    values = old(name)
    values["trainer_settings"] |= settings.pop("trainer", {})
    values["model_settings"] |= settings.pop("model", {})
    return values | settings


PRECISIONS = [
    ("sft_prompt", {"fp16": True}, "float32", "16-mixed"),
    ("sft_prompt", {"fp16": None}, "bfloat16", "16-mixed"),  # the frozen weights; the adapter is in float32
    ("sft_prompt", {"fp16": False, "bf16": True}, "bfloat16", "bf16-mixed"),
    ("sft_prompt", {"fp16": False, "bf16": False}, "bfloat16", None),
    ("sft_prompt", {"fp16": True, "no_cuda": True}, "float32", "32-true"),
    ("sft_prompt", {"use_cpu": True, "no_cuda": False}, "float32", "32-true"),
    ("sft_full", {}, "bfloat16", "bf16-mixed"),
    ("sft_lora", {"fp16": True, "bf16": False}, "bfloat16", "bf16-mixed"),  # modules_to_save are as the base
    ("sft_full", {"fp16": True}, "float32", "16-mixed"),
    ("sft_full", {"fp16": True}, "float16", "16-mixed"),
]


@pytest.mark.parametrize(("name", "settings", "dtype", "expected"), PRECISIONS)
def test_precision_is_one_that_can_train(name, settings, dtype, expected, convert):
    model = {"transformers_settings": {"torch_dtype": dtype}}
    config, _ = ours(
        convert, changed(name, trainer={"fp16": None, "bf16": None, "no_cuda": None, **settings}, model=model)
    )
    assert config["trainer"].get("precision") == expected
    held = config["model"]["init_args"]["backbone"]["dtype"]
    assert held == ("float32" if (name, dtype) == ("sft_full", "float16") else dtype)


def test_what_only_a_gpu_has_is_left_out_on_the_cpu(convert):
    config, err = ours(convert, changed("sft_lora", trainer={"no_cuda": True}))
    assert config["trainer"]["accelerator"] == "cpu"
    assert not {"liger", "quantization", "attention"} & set(config["model"]["init_args"]["backbone"])
    line = next(line for line in err.splitlines() if line.endswith(model.ON_CPU))
    assert all(key in line for key in ("liger_kernels_settings", "load_in_8bit", "attn_implementation"))


def test_prefix_tuning_goes_without_gradient_checkpointing(convert):
    config, err = ours(convert, changed("sft_prefix", trainer={"gradient_checkpointing": True}))
    assert "gradient_checkpointing" not in config["model"]["init_args"]["backbone"]
    assert "not carried over: trainer_settings.gradient_checkpointing: prefix tuning" in err


def test_old_defaults_are_written_out(convert):
    values = old("sft_full") | {"trainer_settings": {}}
    config, _ = ours(convert, values)
    trainer, data, module = config["trainer"], config["data"]["init_args"], config["model"]["init_args"]
    assert (trainer["max_epochs"], trainer["accumulate_grad_batches"], trainer["gradient_clip_val"]) == (3, 32, 1.0)
    assert trainer["val_check_interval"] == 150 * 32 and trainer["check_val_every_n_epoch"] is None
    assert trainer["callbacks"][0]["init_args"] == {"monitor": "val/loss", "save_top_k": 1}
    assert (data["batch_size"], data["packing"], data["num_workers"], data["seed"]) == (4, False, 8, 42)
    assert module["optimizer"] == {
        "learning_rate": 3e-4,
        "weight_decay": 0.0,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "schedule": "cosine",
        "warmup": 0.0,
    }
    assert trainer["logger"] == {
        "class_path": "lit_alignment.ClearMLLogger",
        "init_args": {"project_name": "alignment", "task_name": "sft", "save_dir": "train_output"},
    }
    callbacks = [callback["class_path"] for callback in trainer["callbacks"]]
    assert callbacks[-2:] == ["lit_alignment.Export", "lit_alignment.Throughput"]


def test_settings_of_the_vllm_engine_are_carried_over(convert):
    (text,), _, err = convert(old("inference_vllm"))
    config = yaml.safe_load(text)
    assert config["engine"] == "vllm"
    expected = {"dtype": "bfloat16", "tensor_parallel_size": 2, "gpu_memory_utilization": 0.9, "max_logprobs": 5}
    assert config["vllm"] == expected
    (line,) = [line for line in err.splitlines() if line.endswith(f": {inference.FOLLOWS}")]
    assert "vllm_engine_settings.enable_lora" in line and "vllm_engine_settings.max_lora_rank" in line
    values = old("inference_vllm")
    values["inference_settings"][0] |= {"vllm_engine_settings": {}, "tensor_parallel_size": 4}
    (text,), _, _ = convert(values)
    expected = {"dtype": "bfloat16", "tensor_parallel_size": 4, "gpu_memory_utilization": 0.95}
    assert yaml.safe_load(text)["vllm"] == expected


def test_metrics_are_known_here():
    for name in METRICS.values():
        build_metric(name)


def test_a_path_with_a_space_can_be_pasted(tmp_path):
    document = Document("fit", "x", {"a": 1}, [])
    assert document.how_to_run(tmp_path / "my new.yaml").endswith("my new.yaml'")
    assert yaml.safe_load(document.text(tmp_path / "a.yaml", tmp_path / "b.json", Notes())) == {"a": 1}


def test_classifier_keeps_its_labels_loss_and_picks(convert):
    config, err = ours(convert, old("classification"))
    module = config["model"]["init_args"]
    assert (
        module["labels"] == ["0", "1", "2"] and module["class_weights"] == "balanced" and module["focal_gamma"] == 1.0
    )
    assert module["label_smoothing"] == 0.1 and module["peft"]["class_path"] == "peft.LoraConfig"
    assert "loss_on" not in config["data"]["init_args"]["encoding"]
    names = [callback["class_path"] for callback in config["trainer"]["callbacks"]]
    assert "lit_alignment.ScoredPicks" in names and "lit_alignment.CherryPicks" not in names
    values = changed("classification", model={"model_kwargs": {"id2label": {"10": "c", "2": "b", "1": "a"}}})
    values["trainer_settings"]["loss_settings"] = {"alpha": [1, 2.5, 1], "gamma": 0.0}
    module = ours(convert, values)[0]["model"]["init_args"]
    assert module["labels"] == ["a", "b", "c"] and module["class_weights"] == [1.0, 2.5, 1.0]
    assert "focal_gamma" not in module
    values["model_settings"]["model_kwargs"] = {"num_labels": 1}
    with pytest.raises(ConfigError, match="model_settings.model_kwargs.num_labels is 1; a classifier has two or more"):
        convert(values)


def test_reward_model_keeps_the_ends_and_takes_no_margins(convert):
    config, _ = ours(convert, old("rm"))
    assert config["model"]["init_args"]["use_margin"] is False
    assert config["data"]["init_args"]["encoding"]["truncation"] == "keep_end"
    assert "add_labels" not in config["data"]["init_args"]


def test_each_classifier_of_an_inference_has_a_folder_of_its_own(convert):
    texts = convert(old("inference_classification"))[0]
    first, second = (yaml.safe_load(text) for text in texts)
    folders = [each["trainer"]["callbacks"][0]["init_args"]["output_dir"] for each in (first, second)]
    assert folders == ["classes/0", "classes/1"]
    assert first["model"]["init_args"]["labels"] == ["bad", "good"]
    assert "labels" not in second["model"]["init_args"]  # those of the exported adapter


def test_sampling_is_a_command_line_after_scoring(convert, tmp_path):
    texts, out, _ = convert(old("sampling_rso"))
    line = texts[0].splitlines()[-1]
    assert line == (
        "lit-alignment sample sampled/rewards.jsonl --strategy rso --beta 0.1 --number 3 --seed 7 --form records "
        "--out sampled/sampled.jsonl"
    )
    config = yaml.safe_load(texts[1])
    assert config["trainer"]["callbacks"][0]["init_args"]["output_dir"] == "sampled"
    assert config["data"]["init_args"]["batch_size"] == 4
    files = [part for line in out.splitlines() for part in line.split() if part.startswith(str(tmp_path))]
    assert {Path(name).name for name in files} == {"old.yaml", "old.sh"}
    (tmp_path / "old.yaml").unlink()
    (text,) = convert(old("sampling_random"))[0]
    assert text.splitlines()[-1].startswith("lit-alignment sample 'data/my answers.jsonl' --strategy random --number 3")


def test_notes_on_what_is_learned_stand_before_those_on_what_is_shown():
    notes = Notes()
    for key in (
        "cherry_pick_settings",
        "resuming",
        "train_dataset_settings",
        "model_settings",
        "trainer_settings.fp16",
    ):
        notes.changed[f"about {key}"].append(key)
    notes.changed["about sources"] += ["cherry_pick_settings.sources[0].id", "train_dataset_settings.sources[0].id"]
    assert [line.partition(":")[0].rpartition(", ")[2] for line in notes.groups()[0]] == [
        "trainer_settings.fp16",
        "model_settings",
        "train_dataset_settings",
        "train_dataset_settings.sources[0].id",
        "cherry_pick_settings",
        "resuming",
    ]

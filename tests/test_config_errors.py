"""Each mistake in a configuration names file, line, key and value, and what was probably meant."""

import pytest
import torch
import yaml
from torch import nn

from lit_alignment.config_errors import expected
from lit_alignment.optimization import build_optimizer
from lit_alignment.trainer_cli import build
from tests.helpers.commands import command

TINY = "configs/sft/tiny.yaml"
CALLBACKS = "lightning.pytorch.callbacks"


def error(tmp_path, text: str, *arguments: str) -> str:
    """What fit says of the shipped configuration with more settings over it."""
    mine = tmp_path / "mine.yaml"
    mine.write_text(text)
    config = ["--config", str(mine)] if text else []
    result = command("fit", "--config", TINY, *config, f"--trainer.default_root_dir={tmp_path}", *arguments)
    message = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and message.startswith("lit-alignment: error: "), result.stderr
    return message.removeprefix("lit-alignment: error: ").replace(f"{tmp_path}/", "")


FILES = {
    "short-name": (
        "model: SFTmodule",
        "mine.yaml:1: model: unknown class 'SFTmodule'. Did you mean 'lit_alignment.SFTM",
    ),
    "short-path": ("model: {class_path: SFTmodule}", "Did you mean 'lit_alignment.SFTModule'?"),
    "package": ("model: {class_path: lit_alignmnt.SFTModule}", "Did you mean 'lit_alignment.SFTModule'?"),
    "other-kind": ("model: {class_path: torch.nn.Linear}", "model: torch.nn.Linear is no AlignmentModule. Known: lit_"),
    "data-for-model": (
        "model: {class_path: lit_alignment.SFTDataModule}",
        "is no AlignmentModule. Did you mean 'lit_al",
    ),
    "callback": (
        "trainer:\n  callbacks:\n    - class_path: EarlyStoping",
        f"mine.yaml:3: trainer.callbacks[0]: unknown class 'EarlyStoping'. Did you mean '{CALLBACKS}.EarlyStopping'?",
    ),
    "callback-path": (f"trainer: {{callbacks: [{{class_path: {CALLBACKS}.EarlyStoping}}]}}", "EarlyStopping'?"),
    "callback-key": (
        f"trainer:\n  callbacks:\n    - class_path: {CALLBACKS}.EarlyStopping\n      init_args:\n        moniter: x",
        f"mine.yaml:5: unknown key 'moniter' in {CALLBACKS}.EarlyStopping. Did you mean 'monitor'?",
    ),
    "callback-settings": (
        "trainer: {callbacks: [{class_path: lit_alignment.CherryPicks, init_args: {generation: {max_token: 3}}}]}",
        "unknown key 'max_token' in lit_alignment.DecodingConfig. Did you mean 'max_new_tokens'?",
    ),
    "callback-without-class": (
        "trainer: {callbacks: [{init_args: {}}]}",
        "trainer.callbacks[0]: class_path is missing",
    ),
    "logger": ("trainer: {logger: {class_path: TensorboardLogger}}", "Did you mean 'lightning.pytorch.loggers.TensorB"),
    "init-args": (
        "model: {init_arg: {}}",
        "unknown key 'init_arg' in lit_alignment.SFTModule. Did you mean 'init_args'?",
    ),
    "beside-init-args": ("model: {init_args: {}, backbone: {}}", "unknown key 'backbone' in model."),
    "dictionary": (
        "model: {init_args: {generation: {x: {top: 1}}}}",
        "unknown key 'top' in lit_alignment.DecodingConf",
    ),
    "list": ("data: {init_args: {train: [{path: a}, {pth: b}]}}", "unknown key 'pth' in lit_alignment.SourceConfig"),
    "peft": ("model: {init_args: {peft: {class_path: peft.LoraConfg}}}", "Did you mean 'peft.LoraConfig'?"),
    "peft-key": (
        "model: {init_args: {peft: {class_path: peft.LoraConfig, init_args: {alpha: 2}}}}",
        "key 'alpha' in peft.",
    ),
    "peft-value": (
        "model: {init_args: {peft: {class_path: peft.LoraConfig, init_args: {task_type: X}}}}",
        "LoraConfig: In",
    ),
    "closed": (
        "model: {init_args: {optimizer: {class_path: torch.optim.Adamw}}}",
        "optimizer takes no class_path, only",
    ),
    "list-for-text": (
        "data: {init_args: {train: [{path: [a, b]}]}}",
        "data.init_args.train.path is a list; expected str.",
    ),
    "text-for-list": (
        "data:\n  init_args:\n    train: a.jsonl",
        "mine.yaml:3: data.init_args.train is 'a.jsonl'; expected",
    ),
    "strategy": ("trainer: {strategy: ddpp}", "Trainer: You selected an invalid strategy name: `strategy='ddpp'`"),
    "accelerator": ("trainer: {accelerator: gpuu}", "Trainer: You selected an invalid accelerator name"),
    "devices": ("trainer: {devices: -3}", "Trainer: `devices` selected with `CPUAccelerator` should be an int > 0."),
    "nodes": ("trainer: {num_nodes: 0}", "Trainer: `num_nodes` must be a positive integer, but got 0."),
    "time": ("trainer: {max_time: soon}", "Trainer: `Timer(duration='soon')` is not a valid duration."),
    "nan": (
        "model: {init_args: {optimizer: {learning_rate: .nan}}}",
        "mine.yaml:1: model.init_args.optimizer.learning_rate is nan; give a finite number.",
    ),
    "infinite": (
        "trainer:\n  gradient_clip_val: .inf",
        "mine.yaml:2: trainer.gradient_clip_val is inf; give a finite n",
    ),
    "negative": (
        "model:\n  init_args:\n    optimizer:\n      learning_rate: -1",
        "mine.yaml:4: optimizer.learning_rate is -1.0; use a number above 0.",
    ),
    "null": (
        "data:\n  init_args:\n    batch_size: null",
        "mine.yaml:3: data.init_args.batch_size is null; give a value",
    ),
    "nan-in-list": (
        "data: {init_args: {train: [{path: a, repeat: .nan}]}}",
        "data.init_args.train[0].repeat is nan; give a finite number",
    ),
    "huge": (f"trainer: {{num_nodes: {10**30}}}", "trainer.num_nodes is 1e+30, past any count; give a smaller number."),
    "interval": (
        "trainer:\n  val_check_interval: 0",
        "mine.yaml:2: trainer.val_check_interval is 0; use a number of batches",
    ),
    "callback-without-argument": (
        "trainer:\n  callbacks:\n    - class_path: EarlyStopping",
        f"mine.yaml:3: trainer.callbacks[0]: {CALLBACKS}.EarlyStopping needs 'monitor', which is missing. Give",
    ),
    "settings-without-argument": (
        "model: {init_args: {adapter: {trainable: true}}}",
        "mine.yaml:1: model.init_args.adapter: lit_alignment.AdapterConfig needs 'path', which is missing. Give it.",
    ),
    "source-without-path": (
        "data:\n  init_args:\n    val:\n      - name: x",
        "mine.yaml:4: data.init_args.val[0] has neither 'path' nor 'records'; give one of them.",
    ),
    "other-method": (
        "data: {class_path: lit_alignment.RewardDataModule}",
        "mine.yaml:1: data.class_path is RewardDataModule, and SFTModule reads other data. Use lit_alignment.SFTData",
    ),
    "null-in-callback": (
        "trainer: {callbacks: [{class_path: lit_alignment.CherryPicks, init_args: {generation: {top_p: null}}}]}",
        "trainer.callbacks[0].init_args.generation.top_p is null; give a value",
    ),
    "samples": (
        "data: {init_args: {train: [{path: a, num_samples: -1}]}}",
        "source a: 'offset', 'num_rows' and 'num_samp",
    ),
    "repeat": ("data: {init_args: {train: [{path: a, repeat: 1.0e+30}]}}", "'repeat' (at most 1000000)"),
    "seed": ("seed_everything: -1", "seed_everything: -1 is not in bounds"),
}
OPTIONS = {
    "--model.optimizer.lr=3": "--model.optimizer.lr: unknown key 'lr' in lit_alignment.OptimizerConfig. Did you",
    "--model.init_args.optimizer.lr=3": "Did you mean 'learning_rate'?",
    "--trainer.max_epoch=1": "--trainer.max_epoch: unknown key 'max_epoch' in trainer. Did you mean 'max_epochs'?",
    "--mod=x": "--mod: unknown key 'mod' in the configuration. Did you mean 'model'?",
    "--conf=x": "Did you mean 'config'?",
    "--print_confg": "Did you mean 'print_config'?",
    "--trainer.logger.init_args.save_dirr=x": "unknown key 'save_dirr' in lightning.pytorch.loggers.TensorBoardLogger",
    "--trainer.callbacks+=EarlyStoping": "trainer.callbacks: unknown class 'EarlyStoping'",
    "--lr=3": "--lr: unknown key 'lr' in the configuration. Did you mean 'model.optimizer.learning_rate'?",
    "--model.lr=3": "unknown key 'lr' in lit_alignment.SFTModule. Did you mean 'optimizer.learning_rate'?",
    "--max_steps=3": "Did you mean 'trainer.max_steps'?",
    "--trainer.epochs=3": "unknown key 'epochs' in trainer. Did you mean 'max_epochs'?",
    "--train=x": "Did you mean 'data.train'?",
    "--seed=1": "Did you mean 'seed_everything'?",
    "--model.peft.r=3": "peft.PeftConfig has no setting 'r'. Give its key a class_path first, with one that has it.",
    "--trainer.max_epochs": "--trainer.max_epochs needs a value.",
    "--trainer.max_epochs=1.5": "trainer.max_epochs is 1.5; expected int.",
    "--model.init_args.backbone.compile=maybe": "model.init_args.backbone.compile is 'maybe'; expected bool.",
    "--model.init_args.optimizer.schedule=cosin": "schedule is 'cosin'; expected cosine, linear, constant, wsd.",
    "--model.init_args.generation=3": "model.init_args.generation is 3; expected dict.",
    "--model.init_args.backbone=3": "model.init_args.backbone is 3; expected settings by name.",
    "--seed_everything=many": "seed_everything is 'many'; expected bool or int.",
    "more.yaml": "'more.yaml' is no option. Give a configuration with --config FILE",
}


@pytest.mark.parametrize("name", FILES)
def test_mistake_in_a_file_names_line_and_what_was_meant(name, tmp_path):
    text, words = FILES[name]
    assert words in error(tmp_path, text)


@pytest.mark.parametrize("option", OPTIONS)
def test_mistake_in_an_option_names_it_and_what_was_meant(option, tmp_path):
    assert OPTIONS[option] in error(tmp_path, "", option)


def test_command_without_a_configuration_says_so():
    for name in ("fit", "validate", "test", "predict"):
        assert f"{name}: no configuration. Give one with --config FILE" in command(name).stderr


def test_configuration_without_a_part_says_which(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("trainer: {max_epochs: 1}\n")
    assert "c.yaml: the configuration has no data and model." in command("fit", "--config", str(path)).stderr


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("batch_sise: 1", "in lit_alignment.RewardDataModule. Did you mean 'batch_size'?"),  # a base class takes it
        ("knd: x", "in lit_alignment.RewardDataModule. Did you mean 'kind'?"),
        ("encoding: {max_lenght: 2}", "in lit_alignment.EncodingConfig. Did you mean 'max_length'?"),
    ],
)
def test_settings_of_base_classes_are_known(key, words, tmp_path):
    message = error(tmp_path, f"data: {{class_path: lit_alignment.RewardDataModule, init_args: {{{key}}}}}")
    assert message.startswith("mine.yaml:1: ") and words in message


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        ("torch.optim.Adafactr", "unknown class 'torch.optim.Adafactr'. Did you mean 'torch.optim.Adafactor'?"),
        ("bitsandbites.optim.X", "unknown class 'bitsandbites.optim.X' (no package bitsandbites is installed)."),
        ("torch.nn.Linear", "torch.nn.Linear is no Optimizer."),
        ("torch.optim.SGD, init_args: {momntum: 1.0}", "in torch.optim.SGD. Did you mean 'momentum'?"),
        ("torch.optim.SGD, init_args: {lr: 1.0}", "algorithm.init_args.lr follows from the settings beside"),
    ],
)
def test_settings_of_what_makes_an_optimizer_are_known(algorithm, words, tmp_path):
    optimizer = f"{{algorithm: {{class_path: {algorithm}}}}}"
    message = error(tmp_path, f"model: {{class_path: lit_alignment.SFTModule, init_args: {{optimizer: {optimizer}}}}}")
    assert message.startswith("mine.yaml:1: ") and words in message


def test_algorithm_of_a_configuration_makes_groups_and_takes_its_own_settings():
    option = "{class_path: torch.optim.Adafactor, init_args: {d: 2.0}}"
    cli = build(["--config", TINY, f"--model.init_args.optimizer.algorithm={option}"])
    optimizer, _ = build_optimizer([("a", nn.Parameter(torch.zeros(2)))], cli.model.optimizer_config, 10)
    assert isinstance(optimizer, torch.optim.Adafactor)
    assert (optimizer.defaults["d"], optimizer.param_groups[0]["initial_lr"]) == (2.0, 5e-3)


def test_class_of_an_earlier_file_or_option_is_remembered(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"logger": {"init_args": {"name": "x"}}, "callbacks": []}}))
    options = ["--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor=val/loss"]
    short = ["--model.optimizer.learning_rate=3.0e-4", "--trainer.logger.save_dir", str(tmp_path)]
    cli = build(["--config", TINY, "--config", str(path), *options, *short])
    assert cli.trainer.logger.name == "x" and cli.model.optimizer_config.learning_rate == 3e-4


def test_what_is_expected_is_said_without_repeating_the_parser():
    literal = (
        "Does not validate\n - Expected a typing.Literal['a', 'b']. Got value: c\n - Expected a <class 'NoneType'>"
    )
    assert expected(literal) == "a, b" and expected("something else") == ""
    assert expected("Expected a <class 'int'>\nExpected a <class 'bool'>") == "int or bool"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("checkpoints/a.ckpt", "Give one of the checkpoints in it, such as folder/checkpoints/a.ckpt."),
        ("adapter_config.json", "It holds an adapter: give it as model.adapter.path."),
        ("config.json", "It holds a model: give it as model.backbone.path."),
        ("notes.txt", "It holds notes.txt; give a .ckpt file, or a folder with .metadata and meta.pt."),
    ],
)
def test_folder_that_is_no_checkpoint_is_said_with_what_it_is(name, words, tmp_path):
    file = tmp_path / "folder" / name
    file.parent.mkdir(parents=True)
    file.touch()
    message = error(tmp_path, "", "--ckpt_path", str(tmp_path / "folder"))
    assert message == f"--ckpt_path folder: a folder that is no checkpoint. {words}"

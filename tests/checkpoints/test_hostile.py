"""Nothing that is loaded is executed, changes the configuration, or reaches outside of its folder."""

import copy
import json
import os
import pickle
import shutil
import sys
import zipfile
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import Metadata
from torch.serialization import _get_layout

from lit_alignment import AtomicCheckpointIO, Export, Upload
from lit_alignment.checkpoints.newest import newest_checkpoint
from lit_alignment.checkpoints.resuming import CheckpointConnector
from lit_alignment.checkpoints.saved import read_saved
from lit_alignment.checkpoints.sharded import read_into
from lit_alignment.checkpoints.states import keep_own_paths
from lit_alignment.cli import main
from lit_alignment.errors import CheckpointError, ConfigError
from lit_alignment.files import conformed
from lit_alignment.models.adapters import AdapterConfig, save_adapter
from tests.helpers import base_model_folder, chats, sft_data, trainer
from tests.helpers.adapters import WEIGHTS, fit, module_with
from tests.helpers.hostile import Payload, hostile_adapters, hostile_checkpoints, model_with_code

READERS = {
    "export": read_saved,
    "fit": AtomicCheckpointIO().load_checkpoint,
    "fit on several devices": lambda path: read_into(path, {"optimizer_0": {"evil": None, "state": {}}}),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Content of a checkpoint, and its base model."""
    folder = tmp_path_factory.mktemp("good")
    base = base_model_folder(folder / "base")
    return torch.load(fit(folder, module_with(base, WEIGHTS["lora"])), weights_only=True), base


@pytest.fixture
def marker(tmp_path):
    yield tmp_path / "executed"
    assert not (tmp_path / "executed").exists()


def test_checkpoints_that_hold_code_or_reach_outside_are_refused_by_every_reader(good, tmp_path, marker):
    for what, path in hostile_checkpoints(tmp_path / "evil", good[0], marker).items():
        for how, read in READERS.items():
            if how == "fit on several devices" and not (path / ".metadata").exists():
                continue
            if how == "export" and what == "a Python object in a shard":
                continue  # the optimizer's, which export does not read
            refusals = r"nothing in it is run|not inside it|leads out|cannot read|no checkpoint, or"
            with pytest.raises(CheckpointError, match=refusals):
                read(path)
            assert not marker.exists(), (what, how)


def test_looking_for_the_newest_checkpoint_runs_nothing(good, tmp_path, marker):
    found = hostile_checkpoints(tmp_path / "evil", good[0], marker)
    saver = trainer(tmp_path, callbacks=[ModelCheckpoint(tmp_path / "evil")], enable_checkpointing=True)
    while (newest := newest_checkpoint(saver)) is not None:
        assert newest in found.values()
        newest.rename(newest.with_suffix(".seen"))


@pytest.mark.parametrize("what", ["a Python object in the file", "a Python object as the description of shards"])
def test_commands_refuse_a_checkpoint_with_code_in_one_message(good, tmp_path, marker, capsys, what):
    path = hostile_checkpoints(tmp_path / "evil", good[0], marker)[what]
    fitting = ["fit", "--config", "configs/sft/tiny.yaml", "--trainer.default_root_dir", str(tmp_path)]
    for command in ([*fitting, "--ckpt_path", str(path)], ["export", str(path), "--out", str(tmp_path / "out")]):
        assert main(command) == 2
        opened = f"{open.__module__}.open"  # io.open, or _io.open in newer versions of Python
        assert f"names {opened}, and a checkpoint holds weights and plain values alone" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("asked", [False, True])
def test_a_checkpoint_does_not_switch_on_code_of_its_base_and_the_user_does(good, tmp_path, capsys, asked):
    content, base = good
    marker = tmp_path / "executed"
    folder = model_with_code(tmp_path / "model", base, marker)
    about = content["lit_alignment"]
    backbone = about["backbone"] | {"path": str(folder), "trust_remote_code": True}
    torch.save(content | {"lit_alignment": about | {"backbone": backbone}}, tmp_path / "evil.ckpt")
    command = ["export", str(tmp_path / "evil.ckpt"), "--out", str(tmp_path / "out")]
    main(command + ["--trust-remote-code"] * asked)
    assert marker.exists() == asked
    assert asked or "trust_remote_code" in capsys.readouterr().err


def test_hyper_parameters_of_a_checkpoint_change_no_setting(good, tmp_path, marker):
    content, base = good
    folder = model_with_code(tmp_path / "model", base, marker)
    backbone = {"path": str(folder), "trust_remote_code": True}
    torch.save(content | {"hyper_parameters": {"backbone": backbone}}, tmp_path / "evil.ckpt")
    common = ["--config", "configs/sft/tiny.yaml", "--trainer.default_root_dir", str(tmp_path)]
    assert main(["validate", *common, "--ckpt_path", str(tmp_path / "evil.ckpt")]) == 2  # it is another model's


def test_adapters_run_and_read_nothing_that_their_folder_names(good, tmp_path, marker, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path / "adapters")
    for name, folder in hostile_adapters(tmp_path / "adapters", good[1], marker).items():
        assert main(["export", str(folder), "--out", str(tmp_path / "out")]) == 2, name
        assert capsys.readouterr().err.count("\n") == 1, name
        if name != "base":
            with pytest.raises((CheckpointError, ConfigError)):
                module_with(good[1], adapter=AdapterConfig(str(folder), trainable=True)).load_model()
    assert "evil_megatron" not in sys.modules


def test_a_base_in_pickle_form_runs_nothing(tmp_path, marker):
    folder = base_model_folder(tmp_path / "base")
    (tmp_path / "base/model.safetensors").unlink()
    torch.save({"x": Payload(marker)}, tmp_path / "base/pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot load this model"):
        module_with(folder).load_model()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: [],
        lambda content: {},
        lambda content: content | {"lit_alignment": []},
        lambda content: content | {"state_dict": {"model.x": "text"}},
        lambda content: content | {"state_dict": None},
        lambda content: content | {"lit_alignment": content["lit_alignment"] | {"backbone": {"path": 5}}},
        lambda content: content | {"lit_alignment": content["lit_alignment"] | {"backbone": {"pathh": "x"}}},
        lambda content: content | {"lit_alignment": content["lit_alignment"] | {"peft": {"peft_type": 3}}},
        lambda content: content | {"lit_alignment": content["lit_alignment"] | {"tokens": [1]}},
        lambda content: content | {"lit_alignment": content["lit_alignment"] | {"head": {"labels": 3}}},
        lambda content: content | {"lit_alignment": content["lit_alignment"] | {"modalities": {"image": {}}}},
        lambda content: content | {"lit_alignment": content["lit_alignment"] | {"stop": "x"}},
        lambda content: content | {"lit_alignment": content["lit_alignment"] | {"chat_template": 3}},
    ],
)
def test_a_checkpoint_of_the_wrong_form_is_one_message(good, tmp_path, capsys, damage):
    torch.save(damage(good[0]), tmp_path / "x.ckpt")
    assert main(["export", str(tmp_path / "x.ckpt"), "--out", str(tmp_path / "out")]) == 2
    assert "x.ckpt" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: {},
        lambda content: content | {"state_dict": {name: 1 for name in content["state_dict"]}},
        lambda content: content | {"state_dict": {n: v[:1] for n, v in content["state_dict"].items()}},
        lambda content: content | {"loops": 3},
        lambda content: content | {"loops": {"fit_loop": {}}},
        lambda content: content | {"optimizer_states": "x"},
        lambda content: content | {"optimizer_states": [{"state": {}, "param_groups": []}]},
        lambda content: content | {"lr_schedulers": [3]},
        lambda content: content | {"callbacks": 3},
        lambda content: content | {"pytorch-lightning_version": 3},
        lambda content: {k: v for k, v in content.items() if k != "pytorch-lightning_version"},
        lambda content: content | {"SFTDataModule": 3},
        lambda content: content | {"SFTDataModule": content["SFTDataModule"] | {"train": 3}},
        lambda content: content | {"lit_alignment": content["lit_alignment"] | {"validated": 3}},
        lambda content: content | {"lit_alignment": content["lit_alignment"] | {"module": 3}},
        lambda content: content | {"lit_alignment": content["lit_alignment"] | {"backbone": 3}},
        lambda content: content | {"lit_alignment": content["lit_alignment"] | {"peft": 3}},
    ],
)
def test_a_training_does_not_resume_from_a_checkpoint_of_the_wrong_form(good, tmp_path, damage):
    torch.save(damage(good[0]), tmp_path / "x.ckpt")
    module = module_with(good[1], WEIGHTS["lora"])
    runner = trainer(tmp_path, max_epochs=3)
    runner._checkpoint_connector = CheckpointConnector(runner)
    with pytest.raises(CheckpointError):
        runner.fit(module, sft_data(module, chats(8), batch_size=4), ckpt_path=tmp_path / "x.ckpt")


def changed(content, key, value):
    """A copy in which what a dotted key names is another value, or missing if that is `...`."""
    content = copy.deepcopy(content)
    *path, last = [int(name) if name.isdigit() else name for name in key.split("/")]
    inner = content
    for name in path:
        inner = inner[next(k for k in inner if k.startswith(name)) if name == "ModelCheckpoint" else name]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return content


FIT, STEP = "loops/fit_loop", "epoch_loop.automatic_optimization.optim_progress/optimizer/step"
GROUP, SAVER = "optimizer_states/0/param_groups/0", "callbacks/ModelCheckpoint"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("global_step", 10**30),
        ("global_step", -1),
        ("global_step", float("nan")),
        ("epoch", "1"),
        (f"{FIT}/epoch_progress", ...),
        (f"{FIT}/epoch_progress/current/ready", 1.5),
        (f"{FIT}/epoch_progress/total/completed", ...),
        (f"{FIT}/{STEP}/total/completed", -3),
        (f"{FIT}/epoch_loop.state_dict/_batches_that_stepped", []),
        ("lr_schedulers", {}),
        ("lr_schedulers/0/last_epoch", "x"),
        ("lr_schedulers/0/last_epoch", ...),
        ("lr_schedulers/0/base_lrs", [None]),
        ("optimizer_states/0", 3),
        (f"{GROUP}/lr", "fast"),
        (f"{GROUP}/lr", float("nan")),
        (f"{GROUP}/lr", ...),
        (f"{GROUP}/betas", (0.9,)),
        (f"{GROUP}/betas", (0.9, None)),
        (f"{GROUP}/fused", "x"),
        (f"{GROUP}/params", [100 + number for number in range(28)]),
        ("optimizer_states/0/state/0/exp_avg", ...),
        ("optimizer_states/0/state/0/step", torch.zeros(3)),
        (f"{SAVER}/best_k_models", {"x.ckpt": "low"}),
        (f"{SAVER}/best_model_score", "low"),
        (f"{SAVER}/kth_value", "low"),
        ("SFTDataModule/train/global_step", 10**30),
        ("SFTDataModule/train/epoch", -1),
        ("SFTDataModule/train/ranks", None),
        ("SFTDataModule/train/stretches", [{"used": 1}]),
        ("lit_alignment/validated", [0, "x"]),
    ],
)
def test_a_part_of_another_form_than_the_run_s_own_is_one_message_that_names_it(good, tmp_path, key, value):
    torch.save(changed(good[0], key, value), tmp_path / "x.ckpt")
    module = module_with(good[1], WEIGHTS["lora"])
    runner = trainer(tmp_path, max_epochs=3, callbacks=[ModelCheckpoint(tmp_path)], enable_checkpointing=True)
    runner._checkpoint_connector = CheckpointConnector(runner)
    with pytest.raises(CheckpointError, match=r"the checkpoint.* ha(s|ve) ") as refused:
        runner.fit(module, sft_data(module, chats(8), batch_size=4), ckpt_path=tmp_path / "x.ckpt")
    assert "/state/" in key or "/params" in key or "x.ckpt: " in str(refused.value)


def test_what_another_version_of_a_library_adds_or_lacks_does_not_matter_nor_how_it_computes(good, tmp_path):
    content = changed(changed(good[0], f"{GROUP}/fused", ...), "lr_schedulers/0/verbose", True)
    content = changed(changed(content, f"{GROUP}/differentiable", True), f"{GROUP}/maximize", None)
    content = changed(changed(content, f"{GROUP}/weight_decay", 0), f"{SAVER}/new", [1])
    torch.save(changed(content, "lr_schedulers/0/_is_initial", ...), tmp_path / "x.ckpt")
    module = module_with(good[1], WEIGHTS["lora"])
    runner = trainer(tmp_path, max_epochs=3, callbacks=[ModelCheckpoint(tmp_path)], enable_checkpointing=True)
    runner._checkpoint_connector = CheckpointConnector(runner)
    runner.fit(module, sft_data(module, chats(8), chats(4), batch_size=4), ckpt_path=tmp_path / "x.ckpt")
    assert runner.global_step > good[0]["global_step"]
    assert conformed((0.9, 0.999), [0.5, 0.5], "betas") == [0.9, 0.999]


def test_a_worst_checkpoint_that_is_none_of_the_kept_ones_is_not_looked_for(tmp_path):
    runner = trainer(tmp_path, callbacks=[ModelCheckpoint(tmp_path)], enable_checkpointing=True)
    state = {"best_k_models": {f"{tmp_path}/a.ckpt": torch.tensor(1.0)}, "kth_best_model_path": f"{tmp_path}/b.ckpt"}
    keep_own_paths({"ModelCheckpoint{}": state}, runner)
    assert state["best_k_models"] == {}


def test_an_empty_file_says_so(tmp_path, capsys):
    (tmp_path / "x.ckpt").touch()
    assert main(["export", str(tmp_path / "x.ckpt"), "--out", str(tmp_path / "out")]) == 2
    assert "x.ckpt: cannot read the checkpoint (it is empty)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", ["local://{0}/precious", "{1}/../precious", "{0}/precious", "{1}/link/precious", "file://{0}/precious"]
)
def test_states_of_callbacks_remove_and_send_nothing_outside_of_the_run(good, tmp_path, path):
    """Lightning removes, and Upload sends, what a checkpoint says were its best, last and other checkpoints."""
    content, base = good
    run, precious = tmp_path / "run", tmp_path / "precious"
    (run / "ckpt").mkdir(parents=True)
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    (run / "ckpt/link").symlink_to(tmp_path)
    (key, state) = next((k, v) for k, v in content["callbacks"].items() if k.startswith("ModelCheckpoint"))
    where = path.format(tmp_path, run / "ckpt")
    named = dict.fromkeys(("best_model_path", "last_model_path", "kth_best_model_path"), where)
    named["best_k_models"] = {where: torch.tensor(1.0)}
    for with_folder in (True, False):
        changed = dict(state) | named | {"dirpath": str(run / "ckpt")}
        changed = changed if with_folder else {k: v for k, v in changed.items() if k != "dirpath"}
        torch.save(content | {"callbacks": {key: changed, "Export": {"exported": [where]}}}, tmp_path / "evil.ckpt")
        module = module_with(base, WEIGHTS["lora"])
        callbacks = [Export(), Upload(f"file://{tmp_path}/bucket"), ModelCheckpoint(run / "ckpt", save_last=True)]
        runner = trainer(run, callbacks=callbacks, enable_checkpointing=True, max_epochs=4)
        runner.fit(module, sft_data(module, chats(8), chats(4), batch_size=4), ckpt_path=tmp_path / "evil.ckpt")
        assert (precious / "thesis.txt").read_text() == "years of work"
        assert not list((tmp_path / "bucket").rglob("thesis*"))


def test_moments_of_another_shape_do_not_reach_the_optimizer(good, tmp_path):
    content, base = good
    states = copy.deepcopy(content["optimizer_states"])
    states[0]["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(content | {"optimizer_states": states}, tmp_path / "evil.ckpt")
    module = module_with(base, WEIGHTS["lora"])
    with pytest.raises(CheckpointError, match=r"has exp_avg of shape \[3\] for a weight of"):
        data = sft_data(module, chats(8), chats(4), batch_size=4)
        trainer(tmp_path, max_epochs=3).fit(module, data, ckpt_path=tmp_path / "evil.ckpt")


@pytest.mark.parametrize("made", ["class", "function"])
def test_a_description_of_shards_changes_no_class(good, tmp_path, made):
    path = hostile_checkpoints(tmp_path / "evil", good[0], tmp_path / "executed")["a shard behind a link"]
    names = {
        "class": b"ctorch.distributed.checkpoint.metadata\nMetadata\n",
        "function": b"ctorch.serialization\n_get_layout\n",
    }
    state = b"(N}S'changed'\nI1\nst"  # no attributes of its own, and one for slots
    (path / ".metadata").write_bytes(b"\x80\x02" + names[made] + state + b"b0" + (path / ".metadata").read_bytes()[2:])
    with pytest.raises(CheckpointError, match="it changes"):
        read_saved(path)
    assert not hasattr(Metadata, "changed") and not hasattr(_get_layout, "changed")


def test_damaged_compressed_and_odd_files_are_named(good, tmp_path):
    content, _ = good
    torch.save(content, tmp_path / "x.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "x.ckpt") as old,
        zipfile.ZipFile(tmp_path / "z.ckpt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(CheckpointError, match="it is compressed"):
        read_saved(tmp_path / "z.ckpt")
    data = bytearray((tmp_path / "x.ckpt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "x.ckpt").write_bytes(data)
    with pytest.raises(CheckpointError, match="wrong checksum of"):
        read_saved(tmp_path / "x.ckpt")
    os.mkfifo(tmp_path / "fifo.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    saver = trainer(tmp_path, callbacks=[ModelCheckpoint(tmp_path)], enable_checkpointing=True)
    assert newest_checkpoint(saver) is None  # none of them is taken, and none is waited for


def test_tensors_that_the_shards_do_not_hold_are_refused(good, tmp_path):
    folder = hostile_checkpoints(tmp_path / "evil", good[0], tmp_path / "executed")["a shard behind a link"].parent
    for path in (folder / "shard.ckpt", folder / "beside.ckpt"):
        with (path / ".metadata").open("rb") as file:
            description = pickle.load(file)
        tensor = next(v for k, v in description.state_dict_metadata.items() if k.startswith("state_dict"))
        if path.stem == "shard":
            tensor.chunks.clear()
        else:
            tensor.size = tensor.chunks[0].sizes = torch.Size([2**40])
        (path / ".metadata").write_bytes(pickle.dumps(description))
        with pytest.raises(CheckpointError, match=r"parts of .* are missing|and the shards have"):
            read_saved(path)


def test_shards_behind_the_links_of_the_hub_s_cache_are_read_and_behind_others_not(good, tmp_path):
    saved = hostile_checkpoints(tmp_path / "evil", good[0], tmp_path / "executed")["a shard behind a link"]
    folder = shutil.copytree(saved, tmp_path / "models--x--y/snapshots/abc/run.ckpt", symlinks=True)
    (tmp_path / "models--x--y/blobs").mkdir()
    blob = (tmp_path / "evil/outside.distcp").rename(tmp_path / "models--x--y/blobs/1f")
    for target, refused in ((blob, False), (tmp_path / "models--x--y/snapshots/1f", True), (tmp_path / "1f", True)):
        blob = blob.rename(target)
        (folder / "link.distcp").unlink()
        (folder / "link.distcp").symlink_to(os.path.relpath(target, folder))
        with pytest.raises(CheckpointError, match="a link that leads out") if refused else nullcontext():
            read_saved(folder)


def test_a_list_of_weights_that_names_files_elsewhere_is_refused(tmp_path):
    folder = base_model_folder(tmp_path / "base")
    (tmp_path / "base/model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "../outside.safetensors"}}
    (tmp_path / "base/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"names the file '../outside.safetensors'"):
        module_with(folder).load_model()


def test_a_model_s_folder_with_an_adapter_in_it_is_refused(tmp_path):
    folder = base_model_folder(tmp_path / "base")
    (tmp_path / "base/adapter_config.json").write_text('{"base_model_name_or_path": "some/model"}')
    said = (
        r"holds an adapter, which transformers would load unseen\. Set backbone\.path: some/model, "
        r"model\.adapter: {path: .*/base, trainable: true} \(or false\), and model\.peft: null\."
    )
    with pytest.raises(ConfigError, match=said):
        module_with(folder).load_model()


def test_an_adapter_that_lacks_weights_is_refused(good, tmp_path):
    module = module_with(good[1], WEIGHTS["lora"])
    save_adapter(module.load_model(), tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_file({f"other.{name}": value for name, value in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match=r"lacks 28 weights of the adapter that its configuration describes"):
        module_with(good[1], adapter=AdapterConfig(str(tmp_path / "adapter"))).load_model()

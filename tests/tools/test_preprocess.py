"""`lit-alignment preprocess`: the cache gives the same training, resumes after a kill, tells what it is made of."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from lit_alignment.data.multimodal.feature_cache import FeatureCache, ShardWriter, read_index, shards_of, written_names
from lit_alignment.errors import AlignmentError, CacheError, ConfigError
from lit_alignment.models.multimodal import modality
from lit_alignment.models.multimodal.modality import MediaShape, ModalityConfig
from lit_alignment.models.multimodal.reading import cache_index
from lit_alignment.models.multimodal.vision import EncoderConfig
from lit_alignment.tools.preprocess import main
from tests.helpers import (
    IMAGE,
    ROOT,
    VISION,
    assert_same_gradients,
    picture,
    seen,
    step_gradients,
    vlm_data,
    vlm_module,
)
from tests.helpers.ranks import run_on_ranks


@pytest.fixture
def config(tmp_path):
    """The tiny configuration over pictures in folders."""
    for index in range(7):
        picture(tmp_path / f"pictures/{'ab'[index % 2]}/{index}.png", index)
    found = yaml.safe_load((ROOT / "configs/vlm/tiny.yaml").read_text())
    path = tmp_path / "vlm.yaml"
    path.write_text(yaml.safe_dump(found))
    return path


def run(config, tmp_path, *more):
    out = tmp_path / "cache"
    main(["--config", str(config), "--out", str(out), "--files", str(tmp_path / "pictures"), *more])
    return out


def test_features_are_those_of_the_encoder(config, tmp_path, capsys):
    folder = run(config, tmp_path, "--per-shard", "3", "--batch-size", "2")
    assert "7 files, 16 vectors of 32 numbers each in float32" in capsys.readouterr().out
    assert [len(load_file(shard)) for shard in shards_of(folder)] == [3, 3, 1]
    assert written_names(folder) == {f"{'ab'[i % 2]}/{i}.png" for i in range(7)}
    shape = MediaShape("image", IMAGE)
    cache = FeatureCache(folder, cache_index(shape))
    tower = modality.load_tower(shape, 64, False, "cpu")
    path = str(tmp_path / "pictures/b/3.png")
    with torch.no_grad():
        pixels = [part[None] for part in vlm_module().media["image"].reader.read(path)]
        torch.testing.assert_close(cache.read(path)[0], tower.features(pixels)[0])


def test_training_with_the_cache_is_training_without_and_loads_no_encoder(config, tmp_path, monkeypatch):
    records = seen(tmp_path / "pictures", 6)
    folder = run(config, tmp_path)
    module = vlm_module()
    expected = step_gradients(tmp_path, module, vlm_data(module, records))
    loss = float(module._window_loss)
    monkeypatch.setattr(modality, "load_encoder", None)
    module = vlm_module(image=replace(IMAGE, cache=str(folder)))
    found = step_gradients(tmp_path, module, vlm_data(module, records))
    assert float(module._window_loss) == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(found, expected)
    assert not module.loaded_towers["image"].encoders


def test_killed_run_goes_on_and_encodes_no_file_twice(config, tmp_path, monkeypatch, capsys):
    add, added = ShardWriter.add, []

    def killed(self, name, features):
        if len(added) == 5:
            raise KeyboardInterrupt
        added.append(name)
        add(self, name, features)

    monkeypatch.setattr(ShardWriter, "add", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(config, tmp_path, "--per-shard", "2", "--batch-size", "1")
    folder = tmp_path / "cache"
    assert len(written_names(folder)) == 4 and not read_index(folder).complete
    with pytest.raises(ConfigError, match="not complete. Run lit-alignment preprocess again"):
        FeatureCache(folder, cache_index(MediaShape("image", IMAGE)))
    added.clear()
    monkeypatch.setattr(
        ShardWriter, "add", lambda self, name, features: added.append(name) or add(self, name, features)
    )
    run(config, tmp_path, "--per-shard", "2", "--batch-size", "1")
    assert len(added) == 3 and len(written_names(folder)) == 7
    assert "4 files are encoded" in capsys.readouterr().out


def test_damaged_features_are_noticed_when_they_are_read(config, tmp_path):
    folder = run(config, tmp_path)
    cache, path = FeatureCache(folder, cache_index(MediaShape("image", IMAGE))), str(tmp_path / "pictures/b/3.png")
    cache.read(path)
    (shard,) = shards_of(folder)
    whole = shard.read_bytes()
    values = cache.read(path)[0].numpy().tobytes()
    shard.write_bytes(whole.replace(values, bytes([values[0] ^ 1]) + values[1:]))
    cache = FeatureCache(folder, cache_index(MediaShape("image", IMAGE)))
    cache.read(str(tmp_path / "pictures/a/2.png"))
    with pytest.raises(CacheError, match=r"the features of 'b/3.png' have another checksum\). Delete it, and run"):
        cache.read(path)
    for size in (len(whole) // 2, 4):
        shard.write_bytes(whole[:size])
        with pytest.raises(CacheError, match="Delete it, and run lit-alignment preprocess again"):
            FeatureCache(folder, cache_index(MediaShape("image", IMAGE))).read(path)


@pytest.mark.parametrize("features", [torch.tensor(1.0), torch.ones(2, 16, 32), torch.ones(16, 32, dtype=torch.int32)])
def test_features_of_another_form_are_refused(config, tmp_path, features):
    folder = run(config, tmp_path)
    (shard,) = shards_of(folder)
    save_file(load_file(shard) | {"b/3.png": features}, shard)
    cache = FeatureCache(folder, cache_index(MediaShape("image", IMAGE)))
    with pytest.raises(
        CacheError, match=r"features of 'b/3.png' are \[.*\] in torch.*, and the encoder makes \[16, 32\]"
    ):
        cache.read(str(tmp_path / "pictures/b/3.png"))


@pytest.mark.parametrize(
    "other",
    [
        {"num_patches": 9},
        {"dim": 8},
        {"dim": None},
        {"root": 5},
        {"encoders": [3]},
        {"encoders": {}},
        {"complete": "x"},
    ],
)
def test_an_index_of_other_features_or_of_the_wrong_form_is_refused(config, tmp_path, other):
    folder = run(config, tmp_path)
    path = folder / "features.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | other))
    with pytest.raises(AlignmentError, match=r"cache: holds features of|features.json: not the values of"):
        FeatureCache(folder, cache_index(MediaShape("image", IMAGE)))


def test_unreadable_files_are_listed_and_the_rest_is_encoded(config, tmp_path, capsys):
    broken = tmp_path / "pictures/a/0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    folder = run(config, tmp_path)
    assert "1 files cannot be read" in capsys.readouterr().out
    assert json.loads((folder / "unreadable.jsonl").read_text())["path"] == str(broken)
    assert len(written_names(folder)) == 6
    with pytest.raises(ConfigError, match="1 files cannot be read.*not a readable image"):
        run(config, tmp_path, "--strict")


def test_cache_of_another_encoder_or_layer_is_refused(config, tmp_path):
    folder = run(config, tmp_path)
    for changed in (replace(VISION, layer=-2), replace(VISION, keep_cls=True)):
        module = vlm_module(image=replace(IMAGE, encoders=[changed], cache=str(folder)))
        with pytest.raises(ConfigError, match=r"another encoder made this cache: encoders\[0\] had"):
            module.media  # noqa: B018
    other = tmp_path / "other"
    other.mkdir()
    for file in (ROOT / "configs/tiny_vision").iterdir():
        (other / file.name).write_text(file.read_text().replace("0.48145466", "0.5"))
    module = vlm_module(image=replace(IMAGE, encoders=[replace(VISION, path=str(other))], cache=str(folder)))
    with pytest.raises(ConfigError, match="had hash"):
        module.media  # noqa: B018
    with pytest.raises(ConfigError, match="another encoder made this cache"):
        run(config, tmp_path, "--model.image.encoders=[{path: configs/tiny_vision, weights: random, layer: -2}]")


def test_single_file_of_turbo_alignment_is_read(tmp_path):
    records = seen(tmp_path / "pictures", 4)
    reader, tower = (
        vlm_module().media["image"].reader,
        modality.load_tower(MediaShape("image", IMAGE), 64, False, "cpu"),
    )
    paths = sorted((tmp_path / "pictures").glob("*.png"))
    with torch.no_grad():
        features = {path.name: tower.features([reader.read(str(path))[0][None]])[0].clone() for path in paths}
    save_file(features, tmp_path / "image.clip.safetensors")
    module = vlm_module(image=replace(IMAGE, cache=str(tmp_path / "image.clip.safetensors")))
    data = vlm_data(module, records)
    data.setup("fit")
    assert len(data.examples["train"]) == 4
    save_file({name: value[:, :8].clone() for name, value in features.items()}, tmp_path / "narrow.safetensors")
    module = vlm_module(image=replace(IMAGE, cache=str(tmp_path / "narrow.safetensors")))
    with pytest.raises(CacheError, match=r"are \[16, 8\] in torch.float32, and the encoder makes \[16, 32\]"):
        module.media  # noqa: B018


def test_files_of_the_data_are_encoded_without_a_folder(config, tmp_path):
    out = tmp_path / "cache"
    main(["--config", str(config), "--out", str(out)])
    assert len(written_names(out)) == 32  # every picture once, though records share them
    assert "red-ring-left.png" in written_names(out)


def test_an_encoder_alone_needs_no_configuration(config, tmp_path):
    model = AutoModel.from_config(AutoConfig.from_pretrained(ROOT / "configs/tiny_vision"))
    model.save_pretrained(tmp_path / "clip")
    shutil.copy(ROOT / "configs/tiny_vision/preprocessor_config.json", tmp_path / "clip")
    out = tmp_path / "cache"
    main(["--encoder", str(tmp_path / "clip"), "--files", str(tmp_path / "pictures"), "--out", str(out)])
    assert len(written_names(out)) == 7
    wanted = ModalityConfig([EncoderConfig(str(tmp_path / "clip"))])
    assert len(FeatureCache(out, cache_index(MediaShape("image", wanted)))) == 7


@pytest.mark.slow
def test_two_processes_make_one_cache(config, tmp_path):
    out = tmp_path / "cache"
    files = ["--files", str(tmp_path / "pictures"), "--per-shard", "2", "--trainer.devices=2"]
    run_on_ranks(main, ["--config", str(config), "--out", str(out), *files])
    assert len(written_names(out)) == 7 and {shard.name[:13] for shard in shards_of(out)} == {
        "features-r000",
        "features-r001",
    }


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--files", "nowhere"], "nowhere: no such folder"),
        (["--modality", "audio"], "has no model.audio"),
        (["--encoder", "configs/tiny_vision"], "--encoder goes with --files and without a configuration"),
        (["--per-shard", "0"], "must be 1 or more"),
    ],
)
def test_mistakes_are_named(config, arguments, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        main(["--config", str(config), "--out", str(tmp_path / "cache"), *arguments])


def test_missing_cache_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no feature cache here .*lit-alignment preprocess"):
        vlm_module(image=replace(IMAGE, cache=str(Path(tmp_path) / "none"))).media  # noqa: B018

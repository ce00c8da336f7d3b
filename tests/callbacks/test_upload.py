"""Uploads with real fsspec file systems, one of them faulty."""

import json
import os
import threading

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lit_alignment import Export
from lit_alignment.callbacks.upload import SNAPSHOTS, Upload, fetch_checkpoint
from lit_alignment.checkpoints import remote
from lit_alignment.checkpoints.remote import RemoteFolder, RemoteItem, describe, sha256
from lit_alignment.errors import CheckpointError, ConfigError
from lit_alignment.trainer_cli import build
from tests.helpers import Seen, chats, sft_data, sft_module, trainer, write_jsonl


class Faulty(MemoryFileSystem):
    """A memory file system that refuses writes whose name contains `word`, the first `failures` times."""

    protocol = "faulty"
    word, failures, writes = "", 0, []
    hold = None

    def put_file(self, lpath, rpath, **settings):
        if Faulty.hold is not None and rpath.endswith(".ckpt"):
            Faulty.hold.wait(20)
        if Faulty.failures and Faulty.word in rpath:
            Faulty.failures -= 1
            raise ConnectionError("the line is down")
        super().put_file(lpath, rpath, **settings)
        Faulty.writes.append(rpath.rsplit("/", 1)[-1])


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    Faulty.word, Faulty.failures, Faulty.writes, Faulty.hold = "", 0, [], None
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def fit(folder, upload, *more, resume=None, epochs=3, top=-1):
    module = sft_module(lora=True)
    saver = ModelCheckpoint(folder / "ckpt", monitor="val/loss", save_top_k=top, filename="{step}")
    options = {"max_epochs": epochs, "enable_checkpointing": True}
    runner = trainer(folder, callbacks=[upload, *more, saver], **options)
    runner.fit(module, sft_data(module, chats(6), chats(4, seed=1)), ckpt_path=resume)
    return saver


def manifest(url):
    with fsspec.open(f"{url}/manifest.json") as file:
        return {item["name"]: item for item in json.load(file)["items"]}


def names(url):
    fs, path = fsspec.core.url_to_fs(url)
    return {name.removeprefix(path + "/") for name in fs.find(path)}


def whole(url):
    return {name for name, item in manifest(url).items() if item["uploaded"] and item["kind"] != "report"}


def put(folder, remote_folder, step, score=None, text=None):
    """Store one made-up checkpoint."""
    path = folder / f"step={step}.ckpt"
    path.write_text(text or f"weights {step}")
    files = describe(folder, path.name)
    item = RemoteItem(path.name, "checkpoint", files, f"2026-01-01T00:00:{step:02}", step, "val/loss", score)
    return remote_folder.store(item, folder)


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_manifest_lists_every_file_with_its_hash(tmp_path, scheme):
    url = f"{scheme}://{tmp_path}/there"
    (tmp_path / "config.yaml").write_text("a: 1\n")
    saver = fit(tmp_path, Upload(url), Export(which="kept"))
    items = manifest(url)
    kept = {os.path.basename(path): float(score) for path, score in saver.best_k_models.items()}
    reports = {"config.yaml", "data_report.json"}
    assert set(items) == {*kept, *(name.removesuffix(".ckpt") for name in kept), *reports}
    files = [file for item in items.values() for file in item["files"]]
    assert names(url) == {file["name"] for file in files} | {"manifest.json"}
    for file in files:
        local = tmp_path / ("" if file["name"] in reports else "ckpt") / file["name"]
        assert (file["sha256"], file["size"]) == (sha256(local), local.stat().st_size)
    for name, score in kept.items():
        assert items[name]["score"] == pytest.approx(score) and items[name]["monitor"] == "val/loss"
        assert f"step={items[name]['step']}.ckpt" == name
    best = os.path.basename(saver.best_model_path)
    assert {name for name, item in items.items() if item["best"]} == {best, best.removesuffix(".ckpt")}
    assert not list(tmp_path.rglob(SNAPSHOTS))


def test_checkpoints_are_uploaded_where_their_folder_is_relative(tmp_path):
    """As the logger of a command gives it."""
    module, saver = sft_module(lora=True), ModelCheckpoint(filename="{step}")
    logger = CSVLogger(os.path.relpath(tmp_path), name="n")
    options = {"max_epochs": 1, "enable_checkpointing": True, "logger": logger}
    upload = Upload("memory://run")
    runner = trainer(tmp_path, callbacks=[upload, saver], **options)
    runner.fit(module, sft_data(module, chats(6)))
    saver.last_model_path = os.path.abspath(saver.best_model_path)  # as of a resumed run
    assert len(list(upload._jobs(runner))) == 1
    assert not os.path.isabs(saver.dirpath) and os.path.basename(saver.best_model_path) in whole("memory://run")


def test_what_limits_the_upload(tmp_path):
    fit(tmp_path / "a", Upload("memory://a", what="checkpoints"), Export(), epochs=1)
    assert {item["kind"] for item in manifest("memory://a").values()} == {"checkpoint", "report"}
    fit(tmp_path / "b", Upload("memory://b", what="exports"), Export(), epochs=1)
    assert {item["kind"] for item in manifest("memory://b").values()} == {"export", "report"}


def test_failed_writes_are_tried_again(tmp_path):
    Faulty.word, Faulty.failures = ".ckpt", 3
    fit(tmp_path, Upload("faulty://run", attempts=4), epochs=1)
    assert len(whole("faulty://run")) == 1 and Faulty.failures == 0


def test_failure_is_a_warning_and_training_goes_on(tmp_path):
    Faulty.word, Faulty.failures = ".ckpt", 10_000
    with pytest.warns(UserWarning) as caught:
        saver = fit(tmp_path, Upload("faulty://run", attempts=2))
    said = " ".join(str(warning.message) for warning in caught)
    assert len(saver.best_k_models) == 3  # all epochs were trained
    for path in saver.best_k_models:
        name = os.path.basename(path)
        assert f"{name} did not get to faulty://run (ConnectionError: the line is down)" in said
        assert manifest("faulty://run")[name]["uploaded"] is False
        assert manifest("faulty://run")[name]["problem"] == "ConnectionError: the line is down"
    assert f"not at faulty://run after all attempts: {tmp_path}/ckpt/step=" in said


def test_failed_upload_is_tried_again_with_the_next_checkpoint(tmp_path):
    Faulty.word, Faulty.failures = ".ckpt", 2
    with pytest.warns(UserWarning, match="did not get to"):
        saver = fit(tmp_path, Upload("faulty://run", attempts=2))
    assert whole("faulty://run") == {os.path.basename(path) for path in saver.best_k_models}


def test_unreachable_manifest_does_not_stop_training(tmp_path):
    Faulty.word, Faulty.failures = "manifest", 10_000
    with pytest.warns(UserWarning, match="the manifest cannot be written either"):
        assert len(fit(tmp_path, Upload("faulty://run", attempts=2)).best_k_models) == 3


def test_checkpoint_removed_while_it_uploads_arrives_whole(tmp_path):
    """The upload waits until training has replaced the first checkpoint by better ones."""
    Faulty.hold = threading.Event()

    class Release(Callback):
        def on_train_end(self, trainer, pl_module):
            Faulty.hold.set()

    saver = fit(tmp_path, Upload("faulty://run", what="checkpoints"), Release(), top=1)
    gone = whole("faulty://run") - {os.path.basename(saver.best_model_path)}
    assert gone and not any((tmp_path / "ckpt" / name).exists() for name in gone)
    for name in gone:
        with fsspec.open(f"faulty://run/{name}") as file:
            content = file.read()
        assert manifest("faulty://run")[name]["files"][0]["size"] == len(content)
        (tmp_path / "again.ckpt").write_bytes(content)
        assert "state_dict" in torch.load(tmp_path / "again.ckpt", weights_only=True)


def test_error_in_training_still_finishes_the_uploads(tmp_path):
    class Breaks(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        fit(tmp_path, Upload("memory://run"), Breaks())
    assert len(whole("memory://run")) == 2


def test_item_is_uploaded_once(tmp_path):
    upload = Upload("faulty://run", what="checkpoints")
    saver = fit(tmp_path, upload)
    checkpoints = [name for name in Faulty.writes if name.endswith(".ckpt")]
    assert sorted(checkpoints) == sorted(os.path.basename(path) for path in saver.best_k_models)
    Faulty.writes.clear()
    for again in (upload, Upload("faulty://run", what="checkpoints")):  # the same process, then a new one
        fit(tmp_path, again, resume=saver.best_model_path)
        assert not [name for name in Faulty.writes if name.endswith(".ckpt")]


def test_removal_takes_only_what_the_manifest_lists(tmp_path):
    """`step=1` is removed by name, so that `step=10`, its neighbours and foreign files stay."""
    there = RemoteFolder("memory://run")
    for step in (1, 2, 10):
        put(tmp_path, there, step)
    for name in ("step=1.ckpt.mine", "step=1", "notes.txt"):
        there.fs.pipe_file(f"/run/{name}", b"foreign")
    there.keep_newest(2)
    kept = {"step=10.ckpt", "step=2.ckpt", "step=1.ckpt.mine", "step=1", "notes.txt", "manifest.json"}
    assert names("memory://run") == kept
    there.keep_newest(1)
    assert names("memory://run") == kept - {"step=2.ckpt"} and whole("memory://run") == {"step=10.ckpt"}


def test_best_is_never_removed(tmp_path):
    there = RemoteFolder("memory://run")
    for step, score in ((1, 0.9), (2, 0.1), (3, 0.5), (4, 0.7)):
        put(tmp_path, there, step, score)
    there.mark_best({"val/loss": "min"})
    there.keep_newest(1)
    assert whole("memory://run") == {"step=2.ckpt", "step=4.ckpt"}
    put(tmp_path, there, 5, 0.05)
    there.mark_best({"val/loss": "min"})
    there.keep_newest(1)
    assert whole("memory://run") == {"step=5.ckpt"}


def test_keep_in_a_run_leaves_the_newest_and_the_best(tmp_path):
    url = f"file://{tmp_path}/there"
    saver = fit(tmp_path, Upload(url, keep=1), Export(which="kept"), epochs=4)
    newest = max(saver.best_k_models, key=lambda path: int(path.split("step=")[1].split(".")[0]))
    kept = {os.path.basename(path) for path in (newest, saver.best_model_path)}
    assert whole(url) == kept | {name.removesuffix(".ckpt") for name in kept}
    assert {path.name for path in (tmp_path / "there").iterdir()} == whole(url) | {"manifest.json", "data_report.json"}


def test_upload_killed_in_the_middle_is_not_in_the_manifest(tmp_path):
    """An interrupt stands for the kill: it passes every handler, as nothing runs after a kill."""
    there = RemoteFolder("memory://run")
    put(tmp_path, there, 1)
    (tmp_path / "step=2").mkdir()
    for name in ("a", "b"):
        (tmp_path / "step=2" / name).write_text(name)
    send = there.fs.put_file

    def killed(local, target, **settings):
        if target.endswith("/b"):
            raise KeyboardInterrupt
        send(local, target, **settings)

    there.fs.put_file = killed
    try:
        with pytest.raises(KeyboardInterrupt):
            there.store(RemoteItem("step=2", "export", describe(tmp_path, "step=2"), "t"), tmp_path)
    finally:
        del there.fs.put_file
    assert "step=2/a" in names("memory://run") and set(manifest("memory://run")) == {"step=1.ckpt"}


def test_replaced_item_is_listed_as_not_whole_meanwhile(tmp_path):
    there = RemoteFolder("faulty://run", attempts=1)
    put(tmp_path, there, 1)
    assert put(tmp_path, there, 1) is False
    Faulty.word, Faulty.failures = ".ckpt", 1
    with pytest.raises(ConnectionError):
        put(tmp_path, there, 1, text="other weights")
    assert manifest("faulty://run")["step=1.ckpt"]["problem"] == "being replaced" and not whole("faulty://run")


CASES = {
    "no-scheme": ("bucket/run", "'bucket/run' is not a URL of a folder. Write s3://bucket/folder"),
    "unknown": ("s4://bucket/run", "s4://bucket/run: cannot open .*Protocol not known: s4"),
    "not-writable": ("file:///proc/nothing", "cannot write to file:///proc/nothing .*Check the address"),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_url_is_an_error_before_training(tmp_path, name):
    url, words = CASES[name]
    with pytest.raises(ConfigError, match=f"Upload: .*{words}"):
        fit(tmp_path, Upload(url))
    assert not (tmp_path / "ckpt").exists()


def test_missing_package_is_named_before_training(tmp_path, monkeypatch):
    known = {"class": "no_such_package.FileSystem", "err": "Install no-such-package to access it"}
    monkeypatch.setitem(known_implementations, "absent", known)
    with pytest.raises(ConfigError, match="absent://run: Install no-such-package to access it"):
        fit(tmp_path, Upload("absent://run"))


def test_settings_that_upload_nothing_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="keep is 0; use 1 or more"):
        Upload("memory://run", keep=0)
    with pytest.raises(ConfigError, match="there is no Export callback"):
        fit(tmp_path, Upload("memory://run", what="exports"))
    other = ModelCheckpoint(tmp_path / "other")
    with pytest.raises(ConfigError, match="needs all checkpoints in one folder"):
        fit(tmp_path, Upload("memory://run"), other)


def test_foreign_manifest_is_not_written_over(tmp_path):
    fsspec.filesystem("memory").pipe_file("/run/manifest.json", b'{"version": 1}')
    with pytest.raises(ConfigError, match=r"memory://run/manifest.json is not a manifest of lit-alignment"):
        fit(tmp_path, Upload("memory://run"))
    assert fsspec.filesystem("memory").cat_file("/run/manifest.json") == b'{"version": 1}'


def test_resume_by_url_gives_the_same_next_loss(tmp_path):
    saver = fit(tmp_path, Upload("memory://run"), epochs=2)
    url = f"memory://run/{os.path.basename(saver.best_model_path)}"
    fetched = fetch_checkpoint(url, tmp_path / "cache")
    losses = []
    for name, path in (("local", saver.best_model_path), ("url", fetched)):
        seen = Seen()
        fit(tmp_path / name, Upload("memory://other"), seen, resume=path)
        losses.append(seen.losses)
    assert losses[0] and losses[0] == losses[1]


def test_checkpoint_in_the_cache_is_not_downloaded_again(tmp_path):
    put(tmp_path, RemoteFolder("memory://run"), 1)
    first = fetch_checkpoint("memory://run/step=1.ckpt", tmp_path / "cache")
    MemoryFileSystem.store.pop("/run/step=1.ckpt")
    assert fetch_checkpoint("memory://run/step=1.ckpt", tmp_path / "cache") == first
    assert first.read_text() == "weights 1" and first.name == "step=1.ckpt"


def test_checkpoint_without_a_manifest_is_fetched(tmp_path):
    fsspec.filesystem("memory").pipe_file("/elsewhere/x.ckpt", b"weights")
    assert fetch_checkpoint("memory://elsewhere/x.ckpt", tmp_path).read_bytes() == b"weights"


@pytest.mark.parametrize("listed", [True, False])
def test_copy_whose_bytes_have_changed_is_downloaded_again(tmp_path, listed):
    put(tmp_path, RemoteFolder("memory://run"), 1)
    if not listed:
        MemoryFileSystem.store.pop("/run/manifest.json")
    for _ in range(2):
        fetched = fetch_checkpoint("memory://run/step=1.ckpt", tmp_path / "cache")
        assert fetched.read_text() == "weights 1"
        fetched.write_text("weights X")


def test_damaged_missing_and_unfinished_checkpoints_are_refused(tmp_path):
    there = RemoteFolder("memory://run")
    for step in (1, 2):
        put(tmp_path, there, step)
    there.fs.pipe_file("/run/step=1.ckpt", b"weights X")
    with pytest.raises(CheckpointError, match=r"step=1.ckpt: the download has 9 bytes and SHA-256 .* its manifest"):
        fetch_checkpoint("memory://run/step=1.ckpt", tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    with pytest.raises(CheckpointError, match=r"no such checkpoint. The manifest beside it lists: step=1.ckpt, step=2"):
        fetch_checkpoint("memory://run/step=3.ckpt", tmp_path / "cache")
    there.enter(RemoteItem("step=2.ckpt", "checkpoint", (), "t", problem="ConnectionError"))
    with pytest.raises(CheckpointError, match=r"it is not whole \(ConnectionError\)"):
        fetch_checkpoint("memory://run/step=2.ckpt", tmp_path / "cache")


@pytest.mark.slow
def test_command_line_takes_a_url(tmp_path):
    data = [{"path": write_jsonl(tmp_path / "d.jsonl", chats(6, longest=5))}]
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path / "runs")}}
    quiet = {"max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False, "callbacks": []}
    config = {"trainer": quiet | {"logger": logger}, "data": {"init_args": {"train": data, "val": data, "test": data}}}
    (tmp_path / "c.json").write_text(json.dumps(config))
    arguments = ["--config", "configs/sft/tiny.yaml", "--config", str(tmp_path / "c.json")]
    cli = build(["fit", *arguments], run=True)
    path = cli.trainer.checkpoint_callback.best_model_path
    fsspec.filesystem("memory").put_file(path, "/run/x.ckpt")
    for stage in ("test", "fit"):
        again = build([stage, *arguments, "--trainer.max_epochs=2", "--ckpt_path=memory://run/x.ckpt"], run=True)
        assert again.trainer.ckpt_path.startswith(str(tmp_path / "cache")) or stage == "test"
    assert "ckpt_path: memory://run/x.ckpt" in open(f"{again.trainer.log_dir}/config.yaml").read()
    assert again.trainer.current_epoch == 2


@pytest.mark.parametrize(
    ("item", "file"),
    [
        ("step=1.ckpt", "../victim/precious.txt"),
        ("step=1.ckpt", "/victim/precious.txt"),
        ("step=1.ckpt", "step=1.ckpt/../../victim/precious.txt"),
        ("step=1.ckpt", "another.ckpt"),
        ("step=1.ckpt", "C:\\precious.txt"),
        ("step=1.ckpt", ""),
        ("step=1.ckpt", 3),
        ("..", "../victim/precious.txt"),
        ("runs/step=1.ckpt", "runs/step=1.ckpt"),
    ],
)
def test_a_manifest_that_names_files_elsewhere_writes_and_removes_nothing(tmp_path, item, file):
    victim = tmp_path / "victim/precious.txt"
    victim.parent.mkdir()
    victim.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/step=1.ckpt").write_text("weights")
    entry = {"name": item, "kind": "checkpoint", "time": "1", "uploaded": True}
    entry["files"] = [{"name": file, "size": 7, "sha256": "0"}]
    later = {"name": "step=2.ckpt", "kind": "checkpoint", "files": [], "time": "2", "uploaded": True}
    (tmp_path / "run/manifest.json").write_text(json.dumps({"items": [entry, later]}))
    with pytest.raises((CheckpointError, ConfigError), match=r"names the file|not the values of"):
        fetch_checkpoint(f"file://{tmp_path}/run/step=1.ckpt", tmp_path / "cache/deep/enough")
    remote = RemoteFolder(f"file://{tmp_path}/run")
    with pytest.raises((CheckpointError, ConfigError)):
        remote.read_manifest()
    remote.keep_newest(1)
    assert victim.read_text() == "precious" and not list((tmp_path / "cache").rglob("*.txt"))


@pytest.mark.parametrize("text", ["[]", "{}", '{"items": 3}', '{"items": [3]}', '{"items": [{"name": 3}]}', "[" * 9999])
def test_a_manifest_of_the_wrong_form_is_one_message(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises((CheckpointError, ConfigError), match=r"manifest.json"):
        fetch_checkpoint(f"file://{tmp_path}/step=1.ckpt", tmp_path / "cache")


def test_a_url_that_ends_above_its_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"names the file '..'"):
        fetch_checkpoint(f"file://{tmp_path}/run/..", tmp_path / "cache")

"""What malformed and hostile files, full disks and signals do to commands; rows of `benchmarks.faults`.

    python -m benchmarks.hostile             # about 6 minutes on two CPU cores

Malformed inputs are listed by kind, and made by hypothesis from valid ones, over every form of records, manifests,
caches and checkpoints. Each has to be used, or refused in one message; anything else counts as a traceback, and what
takes a minute as a hang. Hostile checkpoints try to run code or to reach files outside of their folder. Full disks are
limits on the size of a file, under which every command that writes is run. Signals come at every phase of a training.
"""

import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from hypothesis import HealthCheck, Phase, given, settings
from lightning.pytorch import Callback
from safetensors.torch import save_file

from lit_alignment import AtomicCheckpointIO
from lit_alignment.checkpoints.remote import RemoteFolder
from lit_alignment.checkpoints.saved import read_saved
from lit_alignment.cli import main as command
from lit_alignment.data.examples import ExampleMaker
from lit_alignment.data.multimodal.feature_cache import CacheIndex, read_index
from lit_alignment.errors import AlignmentError
from lit_alignment.retrieval.files import Manifest, map_shards, read_manifest
from tests.helpers import ROOT, base_model_folder, chats, write_jsonl
from tests.helpers.adapters import WEIGHTS, fit, module_with
from tests.helpers.hostile import hostile_adapters, hostile_checkpoints
from tests.helpers.malformed import FORMS, cases, load, mutated, mutations

HALF = 10  # malformed files of each form that are listed, and as many that hypothesis makes
UNBOUNDED: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}
PATIENCE = 60  # seconds after which a reader hangs
MANIFESTS: dict[str, tuple[str, dict[str, Any], Callable[[Path], Any]]] = {
    "index": (
        "manifest.json",
        asdict(Manifest({"path": "tiny", "pooling": "mean"}, "abc", 2, "float32", 2)) | {"shards": [["e.x", 2]]},
        lambda folder: map_shards(folder, read_manifest(folder)),
    ),
    "features": ("features.json", asdict(CacheIndex("image", [{"path": "x"}], 4, 8, "float32", "/", True)), read_index),
    "remote": (
        "manifest.json",
        {
            "items": [
                {
                    "name": "a.ckpt",
                    "kind": "checkpoint",
                    "time": "1",
                    "files": [{"name": "a.ckpt", "size": 1, "sha256": "0"}],
                }
            ]
        },
        lambda folder: RemoteFolder(f"file://{folder}", attempts=1).read_manifest(),
    ),
    "adapter": ("adapter_config.json", {"base_model_name_or_path": "x", "peft_type": "LORA", "r": 4}, read_saved),
    "classifier": (
        "config.json",
        {"architectures": ["XForSequenceClassification"], "id2label": {"0": "a"}, "problem_type": "regression"},
        lambda folder: read_saved(_with_adapter(folder)),
    ),
}


def _with_adapter(folder: Path) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "x", "peft_type": "LORA"}))
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")
    return folder


def outcome(read: Callable[[], Any]) -> str:
    """What reading a file ends in."""

    def hang(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(PATIENCE)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            read()
    except (AlignmentError, FileNotFoundError):
        return "one message"
    except TimeoutError:
        return "HANG"
    except Exception as error:  # what is counted
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return "TRACEBACK"
    finally:
        signal.alarm(0)
    return "used or dropped"


def drawn(strategy: Any, number: int, use: Callable[[Any], str]) -> list[tuple[str, str]]:
    """Kind and outcome of so many inputs that hypothesis makes, the same ones each time."""
    found = []

    @settings(max_examples=number, derandomize=True, database=None, phases=[Phase.generate], **UNBOUNDED)
    @given(strategy)
    def check(value: Any) -> None:
        found.append(("made by hypothesis", use(value)))

    check()
    return found


def malformed_records(folder: Path) -> Iterator[tuple[str, str]]:
    """Kind and outcome of files of every form of records and of predictions."""
    file = folder / "bad.jsonl"
    for number, form in enumerate(FORMS):
        listed = list(cases(form))
        for kind, _, body in islice(listed, number % 7, None, len(listed) // HALF):
            file.write_bytes(body)
            yield kind, outcome(partial(load, form, file, folder / "cache"))

        def use(body: bytes, form: str = form) -> str:
            file.write_bytes(body)
            return outcome(partial(load, form, file, folder / "cache"))

        yield from drawn(mutated(form), HALF, use)


def malformed_manifests(folder: Path) -> Iterator[tuple[str, str]]:
    """The same of manifests and configurations of folders."""
    for name, (file, valid, read) in MANIFESTS.items():
        own = folder / name
        own.mkdir()
        text = json.dumps(valid)
        listed = [("cut off", text[: len(text) // 2]), ("cut off", ""), ("wrong type", "[]"), ("deep", "[" * 99_999)]
        listed += [("huge", '{"r": ' + "9" * 5000 + "}"), ("wrong encoding", "\ud800"), ("hostile", '{"a": NaN}')]
        listed += [("wrong type", json.dumps(dict.fromkeys(valid, each))) for each in (None, "x", 3)]
        for kind, body in listed:
            (own / file).write_text(body, errors="surrogatepass")
            yield kind, outcome(partial(read, own))

        def use(record: Any, path: Path = own / file, read: Callable[[Path], Any] = read) -> str:
            path.write_text(json.dumps(record))
            return outcome(partial(read, path.parent))

        yield from drawn(mutations(valid), HALF, use)


def malformed_files(folder: Path, content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The same of caches and checkpoints: cut off, with other bytes, and of the wrong form."""
    generator = random.Random(3)
    source = folder / "records.jsonl"
    write_jsonl(source, chats(20))
    with redirect_stderr(io.StringIO()):
        load("chat", source, folder / "encoded")
    torch.save(content, folder / "good.ckpt")
    cache = next((folder / "encoded").rglob("*.arrow"))
    readers = {cache: partial(load, "chat", source, folder / "encoded")}
    readers[folder / "bad.ckpt"] = partial(AtomicCheckpointIO().load_checkpoint, folder / "bad.ckpt")
    for path, read in readers.items():
        whole = (cache if path == cache else folder / "good.ckpt").read_bytes()
        for number in range(2 * HALF):
            data = bytearray(whole)
            place = generator.randrange(len(data))
            if number % 2:
                data = data[:place]
            else:
                data[place : place + 64] = bytes(each ^ 255 for each in data[place : place + 64])
            path.write_bytes(data)
            yield "cut off" if number % 2 else "other bytes", outcome(read)

    def use(record: Any) -> str:
        torch.save(content | {"lit_alignment": record}, folder / "bad.ckpt")
        return outcome(partial(read_saved, folder / "bad.ckpt"))

    yield from drawn(mutations(json.loads(json.dumps(content["lit_alignment"]))), 2 * HALF, use)


def malformed(folder: Path, content: dict[str, Any]) -> str:
    """Read everything that is malformed."""
    kinds, ends = Counter[str](), Counter[str]()
    for part in (malformed_records(folder), malformed_manifests(folder), malformed_files(folder, content)):
        for kind, end in part:
            kinds[kind] += 1
            ends[end] += 1
            print(f"\r{ends.total()} malformed inputs", end="", file=sys.stderr, flush=True)
    shown = ", ".join(f"{name} {count}" for name, count in kinds.most_common())
    return f"{ends.total()} ({shown}) | {_counts(ends, 'TRACEBACK', 'HANG')}; {_counts(ends, 'one message')}, rest used"


def hostile(folder: Path, content: dict[str, Any], base: str) -> str:
    """Load checkpoints and adapters that try to run code or to reach outside of their folder."""
    marker, ends = folder / "executed", Counter[str]()
    tried: dict[str, Callable[[], Any]] = {}
    for name, path in hostile_checkpoints(folder / "checkpoints", content, marker).items():
        tried[f"fit: {name}"] = partial(AtomicCheckpointIO().load_checkpoint, path)
        tried[f"export: {name}"] = partial(read_saved, path)
    for name, path in hostile_adapters(folder / "adapters", base, marker).items():
        tried[f"adapter: {name}"] = partial(command_or_raise, ["export", str(path), "--out", str(folder / "out")])
    (folder / "precious.txt").write_text("precious")
    for name in ("../precious.txt", str(folder / "precious.txt"), "a.ckpt/../../precious.txt"):
        entry = {"name": "a.ckpt", "kind": "checkpoint", "time": "1", "uploaded": True}
        entry["files"] = [{"name": name, "size": 8, "sha256": "0"}]
        (folder / "remote").mkdir(exist_ok=True)
        tried[f"manifest: {name}"] = partial(remote_with, folder / "remote", {"items": [entry]})
    for read in tried.values():
        ends[outcome(read)] += 1
    outside = int((folder / "precious.txt").read_text() != "precious")
    executed = int(marker.exists())
    return f"{len(tried)} | {executed} executed, {outside} files outside; {_counts(ends, 'TRACEBACK', 'one message')}"


def command_or_raise(words: list[str]) -> None:
    """Run a command, whose exit code 2 is its one message."""
    if command(words) == 2:
        raise AlignmentError


def remote_with(folder: Path, manifest: dict[str, Any]) -> None:
    """Read a manifest, and let retention work by it."""
    (folder / "manifest.json").write_text(json.dumps(manifest))
    remote = RemoteFolder(f"file://{folder}", attempts=1)
    remote.read_manifest()
    remote.keep_newest(0)


# Commands in children of this process, which has imported everything.


def child(work: Callable[[], int]) -> tuple[int, str]:
    """Exit code of something that runs in a child, and what it says."""
    reads, writes = os.pipe()  # no file, whose size is limited
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.dup2(writes, 1)
            os.dup2(writes, 2)
            os.close(reads)
            torch.set_num_threads(1)  # the parent's other threads are not there
            code = work()
        except BaseException as error:
            print(f"Traceback: {error!r}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    os.close(writes)
    with os.fdopen(reads, errors="replace") as said:
        text = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def writers(folder: Path, checkpoint: str) -> dict[str, list[str]]:
    """A command for everything that is written."""
    out = folder / "out"
    tiny = ["--config", "configs/sft/tiny.yaml", f"--trainer.default_root_dir={out}"]
    tiny += [f"--trainer.logger.init_args.save_dir={out}", "--trainer.max_steps=2", f"--data.init_args.cache_dir={out}"]
    saver = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"every_n_train_steps": 1}}
    upload = {"class_path": "lit_alignment.Upload", "init_args": {"url": f"file://{folder / 'up'}", "attempts": 1}}
    predictions = {"class_path": "lit_alignment.PredictionWriter", "init_args": {"output_dir": str(out / "p")}}
    answers = folder / "answers.jsonl"
    rewards = {"0": 1.0, "1": 0.0}
    line = {"id": "a", "messages": chats(1)[0]["messages"][:1], "rewards": rewards}
    line["answers"] = [{"id": key, "content": f"answer {key}"} for key in rewards]
    write_jsonl(answers, [line | {"id": str(number)} for number in range(200)])
    records = f"[{{path: {write_jsonl(folder / 'asked.jsonl', chats(100))}}}]"
    return {
        "fit: configuration, report, metrics, cache, checkpoint": ["fit", *tiny],
        "fit: checkpoints and exports": [
            "fit", *tiny, "--trainer.callbacks", str([saver, {"class_path": "lit_alignment.Export"}])
        ],
        "fit: uploads": ["fit", *tiny, "--trainer.callbacks", str([saver, upload])],
        "fit: samples": ["fit", *tiny],
        "predict": ["predict", *tiny, "--trainer.callbacks", str([predictions]), f"--data.init_args.predict={records}"],
        "export": ["export", checkpoint, "--out", str(out / "exported")],
        "merge": ["merge", checkpoint, "--out", str(out / "merged")],
        "inspect": ["inspect", *tiny, "--html", str(out / "view.html")],
        "sample": ["sample", str(answers), "--strategy=best_of_n", "--form=pairs", "--out", str(out / "pairs.jsonl")],
    }  # fmt: skip


def limited(words: list[str], limit: int) -> int:
    """Run a command where no file grows beyond a size, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return command(words)


def full_disks(folder: Path, checkpoint: str) -> str:
    """Run every writer under limits of different sizes."""
    ends = Counter[str]()
    for name, words in writers(folder, checkpoint).items():
        for limit in (300, 6_000, 200_000):
            shutil.rmtree(folder / "out", ignore_errors=True)
            (folder / "out").mkdir()
            code, said = child(partial(limited, words, limit))
            end = {0: "fitted in", 2: "one message"}.get(code, "OTHER EXIT CODE")
            end = "TRACEBACK" if "Traceback" in said else end
            ends[end] += 1
            if end.isupper():
                print(f"\n{name}, {limit} bytes: {code}\n{said[-2000:]}", file=sys.stderr, flush=True)
            print(f"\r{ends.total()} full disks", end="", file=sys.stderr, flush=True)
    return (
        f"{ends.total()} | {_counts(ends, 'TRACEBACK', 'OTHER EXIT CODE')}; {_counts(ends, 'one message', 'fitted in')}"
    )


class SignalAt(Callback):
    """Sends this process a signal in the given call of a hook.

    Args:
        number: Of the signal.
        hook: Its name.
        call: Which call.
    """

    def __init__(self, number: int, hook: str, call: int = 1) -> None:
        """Nothing is sent."""
        self.number, self.left = number, call
        setattr(self, hook, self._send)

    def _send(self, *_: Any, **__: Any) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


HOOKS = {"sanity validation": ("on_sanity_check_start", 1), "a batch": ("on_train_batch_start", 5)}
HOOKS |= {"the backward pass": ("on_before_backward", 5), "an optimizer step": ("on_before_optimizer_step", 3)}
HOOKS |= {"behind a batch": ("on_train_batch_end", 5), "validation": ("on_validation_batch_end", 3)}
HOOKS |= {"a save": ("on_save_checkpoint", 1), "the end of an epoch": ("on_train_epoch_end", 1)}
HOOKS |= {"the end of training": ("on_train_end", 1), "fit's end": ("on_fit_end", 1)}


def interrupted(words: list[str], number: int, target: tuple[Any, str] | None) -> int:
    """Run a training, with a signal in the first call of a function, if one is given."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if target is None:
        return command(words)
    original = getattr(*target)

    def sends(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), number)
        return original(*arguments, **options)

    with patch.object(*target, sends):
        return command(words)


def signals(folder: Path) -> str:
    """Send SIGINT and SIGTERM at every phase of a training."""
    ends = Counter[str]()
    for number in (signal.SIGINT, signal.SIGTERM):
        for phase in ["imports", "encoding", *HOOKS]:
            out = folder / f"{number}-{phase}".replace(" ", "_")
            words = ["fit", "--config", "configs/sft/tiny.yaml", f"--trainer.default_root_dir={out}"]
            words += [
                f"--trainer.logger.init_args.save_dir={out}",
                "--trainer.max_steps=8",
                "--trainer.val_check_interval=4",
            ]
            if phase in HOOKS:
                hook, call = HOOKS[phase]
                init = {"number": int(number), "hook": hook, "call": call}
                words += [
                    "--trainer.callbacks+",
                    json.dumps({"class_path": "benchmarks.hostile.SignalAt", "init_args": init}),
                ]
            if phase == "imports":
                heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
                run = [sys.executable, "-m", "lit_alignment", *words]
                process = subprocess.Popen(run, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
                time.sleep(1)
                process.send_signal(number)
                _, said = process.communicate()
                code = process.returncode
            else:
                target = (ExampleMaker, "load") if phase == "encoding" else None
                code, said = child(partial(interrupted, words, number, target))
            over = phase in ("the end of an epoch", "the end of training", "fit's end")  # everything is done and saved
            right = code in (128 + number, -number) or (over and code == 0)
            saved = phase not in list(HOOKS)[1:8] or bool(list(out.rglob("*.ckpt")))
            end = "right exit code" if right and saved and "Traceback" not in said else "WRONG END"
            ends[end] += 1
            if end.isupper():
                print(f"\n{phase}, {number}: {code}, {saved}\n{said[-2000:]}", file=sys.stderr, flush=True)
            print(f"\r{ends.total()} signals", end="", file=sys.stderr, flush=True)
    return f"{ends.total()} | {_counts(ends, 'WRONG END')}; the others ended with 130 or 143, saved where they stood"


def _counts(ends: Counter[str], *names: str) -> str:
    return ", ".join(f"{ends[name]} {name.lower()}" for name in names)


def quiet() -> None:
    """Leave out what libraries and runs say."""
    for name in ("lightning.pytorch", "lightning.fabric", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def rows() -> Iterator[tuple[str, str]]:
    """What was done, and how often with which outcome."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = base_model_folder(folder / "base")
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            checkpoint = fit(folder, module_with(base, WEIGHTS["lora"]))
        content = torch.load(checkpoint, weights_only=True)
        yield "malformed records, manifests, caches and checkpoints", malformed(folder, content)
        (folder / "hostile").mkdir()
        yield "hostile checkpoints, adapters and manifests", hostile(folder / "hostile", content, base)
        yield "a full disk under every writer", full_disks(folder, checkpoint)
        yield "SIGINT and SIGTERM at every phase of a training", signals(folder)


def main() -> None:
    """Print a table."""
    quiet()
    print("| fault | times | outcome |\n|---|---|---|", flush=True)
    for title, row in rows():
        print(file=sys.stderr, flush=True)  # below the count
        print(f"| {title} | {row} |", flush=True)


if __name__ == "__main__":
    main()

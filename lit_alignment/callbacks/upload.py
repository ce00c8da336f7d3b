"""Checkpoints, exports and reports, copied to remote storage while training continues."""

import hashlib
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_alignment.callbacks.export import Export
from lit_alignment.checkpoints.background import save_queue
from lit_alignment.checkpoints.remote import RemoteFile, RemoteFolder, RemoteItem, RemoteKind, describe, reason
from lit_alignment.checkpoints.sharded import swap
from lit_alignment.checkpoints.states import is_inside
from lit_alignment.distributed.rank_zero import on_rank_zero
from lit_alignment.errors import CheckpointError, ConfigError
from lit_alignment.files import relative
from lit_alignment.secrets import mask_text

REPORTS = ("config.yaml", "data_report.json", "report.html", "report.json")
SNAPSHOTS = ".upload-snapshots"
NOTED = ".files"  # beside a downloaded checkpoint: what it consists of


@dataclass(frozen=True)
class UploadJob:
    """Something on the local disk that has to be sent.

    Args:
        path: The file or folder.
        kind: What it is.
        step: Optimizer step.
        monitor: Name of the metric that `score` is.
        score: The checkpoint's metric.
    """

    path: Path
    kind: RemoteKind
    step: int | None = None
    monitor: str | None = None
    score: float | None = None


class Upload(Callback):
    """Copy checkpoints, exports and, at the end, the run's reports below a URL.

    One background thread of rank 0 sends them; what it sends is a hard link made beside the file, so a checkpoint
    that training removes or replaces meanwhile arrives whole. `manifest.json` lists what is there. An upload that
    fails is a warning, is listed as failed, and is tried again with the next checkpoint and at the end; it never
    stops the run. A file that has the name of one of ours is replaced: give each run a URL of its own.

    Args:
        url: `s3://bucket/folder`, `gs://...`, `file:///...` or another address that fsspec knows.
        keep: How many checkpoints, and how many exports, to keep there besides the best; all by default.
        what: What to upload.
        attempts: How often to try each operation, with waits of 1, 2, 4... seconds.
        storage_options: What the file system's class takes, such as `endpoint_url`.
    """

    def __init__(
        self,
        url: str,
        keep: int | None = None,
        what: Literal["exports", "checkpoints", "all"] = "all",
        attempts: int = 4,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        """The URL is tried when the fit starts."""
        for name, value in (("keep", keep), ("attempts", attempts)):
            if value is not None and value < 1:
                raise ConfigError(f"Upload: {name} is {value}; use 1 or more.")
        self.url, self.keep, self.what = url, keep, what
        self.shown = mask_text(url)
        self.attempts, self.storage_options = attempts, storage_options
        self._remote: RemoteFolder | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []
        self._taken: dict[Path, tuple[int, int]] = {}
        self._failed: dict[Path, UploadJob] = {}
        self._gone: set[Path] = set()
        self._folders: set[Path] = set()
        self._modes: dict[str, str] = {}
        self._number = 0
        self._looked = -1

    # Hooks.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write to the URL once, so that a wrong address or password is found before training.

        Raises:
            ConfigError: If that fails, or there is nothing to upload.
        """
        if stage != "fit":
            return
        if not trainer.checkpoint_callbacks:
            raise ConfigError("the Upload callback needs checkpoints: set trainer.enable_checkpointing, or remove it.")
        if self.what == "exports" and not any(isinstance(c, Export) for c in _callbacks(trainer)):
            raise ConfigError("Upload: what is exports, and there is no Export callback. Add lit_alignment.Export.")
        self._run_dir = Path(trainer.log_dir or trainer.default_root_dir)  # agreed among ranks: each must ask
        on_rank_zero(trainer, self._start)

    def _start(self) -> None:
        try:
            remote = RemoteFolder(self.url, self.storage_options, self.attempts)
            remote.check_writable()
            remote.read_manifest()
        except (ConfigError, CheckpointError) as error:
            raise ConfigError(f"Upload: {error}") from error
        self._remote, self._looked = remote, -1
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="upload")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse checkpoints from several folders: equal names would replace each other."""
        savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        folders = {str(saver.dirpath) for saver in savers}
        if len(folders) > 1:
            raise ConfigError(f"Upload needs all checkpoints in one folder, not in {', '.join(sorted(folders))}.")
        self._modes = {saver.monitor: saver.mode for saver in savers if saver.monitor}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Take what was saved since the last step; ModelCheckpoint saves after all other callbacks."""
        if self._pool is not None and trainer.global_step != self._looked:
            self._looked = trainer.global_step
            save_queue(trainer).then(partial(self._take_new, list(self._jobs(trainer))))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Finish what is pending before the error or Ctrl+C ends the run."""
        self._finish(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finish what is pending; Export's last folder was written just before."""
        if stage == "fit":
            self._finish(trainer)

    # Rank 0, main thread.

    def _jobs(self, trainer: Trainer) -> Iterator[UploadJob]:
        """All checkpoints that are kept now, and their exports."""
        for saver in (c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)):
            scores: dict[str, Tensor | None] = {saver.last_model_path: None}
            scores |= {saver.best_model_path: saver.best_model_score, **saver.best_k_models}
            place = [str(saver.dirpath)]  # which an earlier run's best is not in
            own = {os.path.abspath(name): score for name, score in scores.items() if is_inside(name, place)}
            for path, score in ((Path(name), score) for name, score in own.items()):
                number = re.search(r"step=(\d+)", path.stem)
                step = int(number[1]) if number else trainer.global_step
                value = None if score is None or not math.isfinite(score) else float(score)
                if self.what != "exports":
                    yield UploadJob(path, "checkpoint", step, saver.monitor, value)
                if self.what != "checkpoints" and os.path.isdir(path.with_suffix("")):
                    yield UploadJob(path.with_suffix(""), "export", step, saver.monitor, value)

    def _take_new(self, jobs: list[UploadJob]) -> None:
        """Start to send what is new, and with it what failed before."""
        new = []
        for job in jobs:
            identity = _identity(job.path)
            if identity is None and job.path not in self._gone:
                self._gone.add(job.path)
                rank_zero_info(f"upload: {job.path} is not on this machine, so it is not uploaded.")
            elif identity is not None and identity != self._taken.get(job.path):
                new.append(job)
        if new:
            self._take([*new, *self._take_failed({job.path for job in new})])

    def _take_failed(self, besides: set[Path]) -> list[UploadJob]:
        """Failed jobs that can be tried again, no longer listed as failed; what is gone here stays listed."""
        again = [job for job in list(self._failed.values()) if _identity(job.path) is not None]
        for job in again:
            del self._failed[job.path]
        return [job for job in again if job.path not in besides]

    def _take(self, jobs: list[UploadJob]) -> None:
        """Link each job's files to a place of their own and hand them to the background thread."""
        for job in jobs:
            self._number += 1
            snapshots = job.path.parent / SNAPSHOTS
            folder = snapshots / str(self._number)
            try:
                if snapshots not in self._folders and snapshots.is_dir():
                    shutil.rmtree(snapshots)  # left by a run that was killed
                self._folders.add(snapshots)
                identity = _identity(job.path)
                _snapshot(job.path, folder)
            except OSError as error:
                rank_zero_warn(
                    f"upload: cannot read {job.path} for {self.shown} ({reason(error)}); trying again later."
                )
                shutil.rmtree(folder, ignore_errors=True)
                self._failed[job.path] = job
                continue
            if identity is not None:
                self._taken[job.path] = identity
            if self._pool is not None:
                self._pending.append(self._pool.submit(self._send, job, folder))

    def _finish(self, trainer: Trainer) -> None:
        """Send everything that is left, and what failed once more."""
        if self._pool is None:
            return
        save_queue(trainer).settle()  # an error is raised when the run ends
        self._take_new(list(self._jobs(trainer)))
        self._wait()
        reports = [UploadJob(self._run_dir / name, "report", trainer.global_step) for name in REPORTS]
        reports = [job for job in reports if job.path.is_file()]
        self._take([*reports, *self._take_failed({job.path for job in reports})])
        self._wait()
        self._pool.shutdown()
        self._pool = None
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)
        self._folders.clear()
        if self._failed:
            names = ", ".join(sorted(str(path) for path in self._failed))
            rank_zero_warn(
                f"upload: not at {self.shown} after all attempts: {names}. Copy what is still here yourself."
            )
        else:
            rank_zero_info(f"upload: everything is at {self.shown}.")

    def _wait(self) -> None:
        waiting = sum(not future.done() for future in self._pending)
        if waiting:
            rank_zero_info(f"upload: {waiting} left to send to {self.shown}...")
        for future in as_completed(self._pending):
            error = future.exception()
            if error is not None:
                rank_zero_warn(f"upload: to {self.shown} failed ({reason(error)}).")
        self._pending = []

    # Rank 0, background thread.

    def _send(self, job: UploadJob, folder: Path) -> None:
        """Send one job; whatever fails is reported, not raised."""
        remote = self._remote
        if remote is None:
            return
        item = RemoteItem(job.path.name, job.kind, (), "", job.step, job.monitor, job.score)
        try:
            saved = datetime.fromtimestamp((folder / item.name).stat().st_mtime, UTC)
            item = replace(item, time=saved.isoformat(timespec="microseconds"), files=describe(folder, item.name))
            if remote.store(item, folder):
                size = sum(file.size for file in item.files)
                rank_zero_info(f"upload: {self.shown}/{item.name} ({size / 2**20:.1f} MiB)")
        except Exception as error:  # every storage library has errors of its own, and none may stop the training
            self._failed[job.path] = job
            self._record_failure(remote, item, reason(error))
            return
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            remote.mark_best(self._modes)
            if self.keep is not None:
                remote.keep_newest(self.keep)
        except Exception as error:  # as above
            rank_zero_warn(f"upload: cannot tidy {self.shown} ({reason(error)}); trying again after the next upload.")

    def _record_failure(self, remote: RemoteFolder, item: RemoteItem, why: str) -> None:
        note = "listed as failed there"
        try:
            remote.enter(replace(item, problem=why), attempts=1)
        except Exception as error:  # as above
            note = f"the manifest cannot be written either ({reason(error)})"
        rank_zero_warn(f"upload: {item.name} did not get to {self.shown} ({why}); {note}. Trying again later.")


def _callbacks(trainer: Trainer) -> list[Callback]:
    found: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return found


def _identity(path: Path) -> tuple[int, int] | None:
    """What changes when a file or folder is replaced; None if there is none, or the disk does not answer."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _snapshot(path: Path, folder: Path) -> None:
    """Hard links in `folder` to a file or to the files of a folder; copies where the disk has no hard links."""
    folder.mkdir(parents=True)
    source, target = path.resolve(), folder / path.name
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link)
    else:
        _link(str(source), str(target))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def fetch_checkpoint(url: str, cache: Path, storage_options: dict[str, Any] | None = None) -> Path:
    """A local copy of a checkpoint that lies behind a URL, downloaded unless it is in the cache as it was downloaded.

    Args:
        url: Address of the checkpoint.
        cache: Folder of the copies.
        storage_options: What the file system's class takes.

    Raises:
        ConfigError: If the URL is malformed, or its protocol needs a package that is not installed.
        CheckpointError: If there is no such checkpoint, it cannot be read, or it differs from its manifest.
    """
    parent, _, name = url.rstrip("/").rpartition("/")
    remote, shown = RemoteFolder(parent, storage_options), mask_text(url)
    relative(name, shown)
    remote.read_manifest()
    item = remote.items.get(name)
    if item is not None and not item.uploaded:
        raise CheckpointError(f"{shown}: the manifest beside it says that it is not whole ({item.problem}).")
    try:
        version = str(item.files) if item else remote.fs.ukey(f"{remote.path}/{name}")
        target = cache / "checkpoints" / hashlib.sha256(f"{url} {version}".encode()).hexdigest()[:24] / name
        noted = target.with_name(NOTED)
        expected = str(item.files) if item else noted.read_text() if noted.is_file() else ""
        if not target.exists() or str(describe(target.parent, name)) != expected:
            rank_zero_info(f"checkpoint: downloading {shown} to {target}")
            _download(remote, name, item, target)
    except FileNotFoundError as error:
        listed = ", ".join(i.name for i in remote.items.values() if i.kind == "checkpoint" and i.uploaded)
        raise CheckpointError(
            f"{shown}: no such checkpoint. The manifest beside it lists: {listed or 'none'}."
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # every storage library has errors of its own
        raise CheckpointError(f"{shown}: cannot download the checkpoint ({reason(error)}).") from error
    return target


def _download(remote: RemoteFolder, name: str, item: RemoteItem | None, target: Path) -> None:
    """Download beside the target, compare with the manifest, note what it holds, and rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
        for part in [file.name for file in item.files] if item else [name]:
            local = Path(folder) / part
            local.parent.mkdir(parents=True, exist_ok=True)
            remote.fs.get_file(f"{remote.path}/{part}", str(local))
        found = describe(Path(folder), name)
        if item is not None:
            _compare(remote.url, item, found)
        target.with_name(NOTED).write_text(str(found))
        swap(Path(folder) / name, target)


def _compare(url: str, item: RemoteItem, found: tuple[RemoteFile, ...]) -> None:
    for want, have in zip(item.files, found, strict=True):
        if want != have:
            raise CheckpointError(
                f"{url}/{want.name}: the download has {have.size} bytes and SHA-256 {have.sha256[:12]}, its manifest "
                f"says {want.size} and {want.sha256[:12]}. It was damaged or replaced there; use another checkpoint."
            )

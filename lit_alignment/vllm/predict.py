"""`predict` with `engine: vllm`: prompts stream into the engine, and predictions into files as they are done."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from lit_alignment.callbacks.predictions import PredictionWriter
from lit_alignment.checkpoints.restore import Saved, head_of, read_saved
from lit_alignment.data.base import AlignmentDataModule
from lit_alignment.data.encoding.prompts import Item
from lit_alignment.data.sources.report import write_reports
from lit_alignment.errors import ConfigError
from lit_alignment.generation.prediction_file import PredictionFile
from lit_alignment.modules.base import AlignmentModule
from lit_alignment.modules.generative import GenerativeModule
from lit_alignment.modules.scoring import ScoringModule
from lit_alignment.paths import local_path
from lit_alignment.vllm.engine import VLLMEngine, engine_arguments, import_vllm, on_cpu
from lit_alignment.vllm.jobs import Job, generation_job, scoring_job
from lit_alignment.vllm.model import Served, served_model

DECIDES = ("dtype", "quantization", "max_model_len")  # what of the engine's arguments decides an answer
FLUSH_SECONDS = 0.5
OURS = ("model", "tokenizer", "runner", "enable_lora")


@dataclass
class Summary:
    """What a run has done.

    Args:
        prompts: Items that were finished.
        tokens: Tokens that were generated, or read where there were only scores.
        seconds: From the first request to the last answer.
        failed: Items without a prediction, and why.
    """

    prompts: int = 0
    tokens: int = 0
    seconds: float = 0.0
    failed: list[tuple[Item, str]] = field(default_factory=list)

    def __str__(self) -> str:
        seconds = max(self.seconds, 1e-9)
        return f"{self.prompts / seconds:.1f} prompts/s, {self.tokens / seconds:.0f} tokens/s"


def predict(
    module: AlignmentModule,
    data: AlignmentDataModule,
    trainer: Trainer,
    settings: dict[str, Any],
    checkpoint: str | None = None,
) -> Summary:
    """Answer, classify or score all that `data.predict` asks.

    Args:
        module: The method; its own model is not run.
        data: The prompts.
        trainer: Has the PredictionWriter; nothing else of it is used.
        settings: Arguments of vLLM's engine.
        checkpoint: The trained weights; else those of the backbone and of an existing adapter.

    Raises:
        ConfigError: If vLLM is not installed, cannot run this model, or scores otherwise than transformers.
    """
    import_vllm()
    for name in OURS:
        if name in settings:
            raise ConfigError(f"vllm.{name} follows from the rest of the configuration: leave it out.")
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    writer = next(callback for callback in callbacks if isinstance(callback, PredictionWriter))
    module.trainer = trainer
    trainer.datamodule = data  # type: ignore[attr-defined]
    trainer.ckpt_path = checkpoint
    saved = None if checkpoint is None else read_saved(Path(checkpoint))
    served = served_model(Path(checkpoint)) if checkpoint is not None else _untrained(module)
    data.setup("predict")
    write_reports(data.reports, writer.output_dir)
    job = _job(module, saved, served)
    chosen = _defaults(module) | served.settings() | job.settings() | settings
    arguments = engine_arguments(chosen)
    writer.engine = {"engine": {"name": "vllm", **{name: getattr(arguments, name) for name in DECIDES}}}
    writer.setup(trainer, module, "predict")
    batches = data.predict_dataloader()
    if len(batches) == 0:
        return Summary()  # everything is there, and the writer has said so
    engine = VLLMEngine(arguments)
    try:
        job.check(next(iter(batches)).items, engine)
        if served.adapter is not None:
            from vllm.lora.request import LoRARequest

            engine.lora = LoRARequest("trained", 1, served.adapter)
        summary = _answer(job, engine, batches, writer, trainer)
    finally:
        engine.close()
    writer.on_predict_end(trainer, module)
    print(f"{summary.prompts} prompts, {summary.tokens} tokens: {summary}")
    _report(summary.failed, writer.output_dir)
    return summary


def _untrained(module: AlignmentModule) -> Served:
    """A model as it is before training.

    Raises:
        ConfigError: If something of it would have random weights.
    """
    backbone = module.backbone
    why = ""
    if backbone.weights == "random":
        why = "backbone.weights is random"
    elif module.added_tokens:
        why = "the rows of new tokens are not trained"
    elif module.peft_config is not None and module.peft_config.is_prompt_learning:
        why = f"the vectors of {type(module.peft_config).__name__} are not trained"
    elif module.head is not None and module.adapter is None and not _is_classifier(backbone.path):
        why = "the head is not trained"
    if why:
        raise ConfigError(f"nothing to predict with: {why}. Give --ckpt_path.")
    if module.adapter is not None:
        return served_model(Path(module.adapter.path).expanduser())
    return Served(local_path(backbone.path), revision=backbone.revision)


def _is_classifier(path: str) -> bool:
    return head_of(Path(local_path(path)).expanduser()) is not None


def _job(module: AlignmentModule, saved: Saved | None, served: Served) -> Job:
    if isinstance(module, ScoringModule):
        return scoring_job(module, saved)
    if isinstance(module, GenerativeModule):
        return generation_job(module, saved, served)
    raise ConfigError(f"{type(module).__name__} has nothing for vLLM to compute. Use engine: transformers.")


def _defaults(module: AlignmentModule) -> dict[str, Any]:
    """As the transformers engine would compute; a CPU has no use for compiled graphs of so short a run."""
    half = "float32" if on_cpu() else "bfloat16"
    dtype = half if module.backbone.dtype == "auto" else module.backbone.dtype
    return {"dtype": dtype, "generation_config": "vllm", **({"enforce_eager": True} if on_cpu() else {})}


def _answer(job: Job, engine: VLLMEngine, batches: Any, writer: PredictionWriter, trainer: Trainer) -> Summary:
    """Run all requests, writing as they are done."""
    ready: dict[str, list[tuple[Item, dict[str, Any]]]] = {}
    start = flushed = time.monotonic()
    summary = Summary()

    def flush() -> None:
        for name, predictions in ready.items():
            writer.write(name, predictions)
        ready.clear()

    columns = (
        SpinnerColumn(),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("starting", total=writer.missing(trainer))
        try:
            for result in engine.run(job.requests(batches, writer)):
                finished = job.take(result)
                if finished is None:
                    continue
                now = time.monotonic()
                summary.prompts += 1
                summary.tokens += finished.tokens
                summary.seconds = now - start
                if finished.problem:
                    summary.failed.append((finished.item, finished.problem))
                else:
                    ready.setdefault(finished.name, []).append((finished.item, finished.prediction))
                if now - flushed > FLUSH_SECONDS:
                    flush()
                    flushed = now
                bar.update(task, completed=summary.prompts, description=str(summary))
        finally:
            flush()  # whatever happened, what is done is kept
    return summary


def _report(failed: list[tuple[Item, str]], folder: Path) -> None:
    """Write and say which prompts have no answer."""
    file = PredictionFile(folder / "failed.jsonl")
    file.remove()
    if not failed:
        return
    file.append([{"id": item.id, "dataset": item.dataset, "problem": problem} for item, problem in failed])
    file.finish({})
    item, problem = failed[0]
    print(
        f"warning: {len(failed)} prompts have no answer, and {file.path} lists them; the first is "
        f"{item.dataset}/{item.id}: {problem}"
    )

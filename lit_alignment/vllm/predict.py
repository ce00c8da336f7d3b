"""`predict` with `engine: vllm`: prompts stream into the engine, and predictions into files as they are done."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from lit_alignment.callbacks.predictions import PredictionWriter
from lit_alignment.checkpoints.saved import head_of, read_saved
from lit_alignment.data.base import AlignmentDataModule
from lit_alignment.data.encoding.prompts import Item
from lit_alignment.data.sources.report import write_reports
from lit_alignment.errors import ConfigError
from lit_alignment.generation.engine import Engine, EngineNeeds, ItemRequests, Refusal, Request, Result
from lit_alignment.generation.prediction_file import PredictionFile
from lit_alignment.generation.transformers_engine import TransformersEngine
from lit_alignment.modules.base import AlignmentModule
from lit_alignment.paths import local_path
from lit_alignment.vllm.engine import VLLMEngine, engine_arguments, import_vllm, on_cpu
from lit_alignment.vllm.model import Served, served_model

DECIDES = ("dtype", "quantization", "max_model_len")  # what of the engine's arguments decides an answer
FLUSH_SECONDS = 0.5
OURS = ("model", "tokenizer", "runner", "enable_lora")
COMPARED = 16  # items whose scores are compared with transformers'
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of the largest score, or of 1


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


@dataclass
class OpenItem:
    """An item whose requests are not all answered.

    Args:
        name: The file of predictions that it belongs to.
        item: The item.
        asked: Its requests.
        results: By the request's number among them.
    """

    name: str
    item: Item
    asked: ItemRequests
    results: dict[int, Result] = field(default_factory=dict)

    def requests(self) -> Iterator[Request]:
        """The requests, each owned by this and its number."""
        for number, request in enumerate(self.asked.requests):
            yield replace(request, owner=(self, number))

    @property
    def done(self) -> bool:
        """Whether all requests are answered."""
        return len(self.results) == len(self.asked.requests)

    @property
    def problem(self) -> str:
        """Why there is no prediction, or ""."""
        return next((each.problem for each in self.results.values() if isinstance(each, Refusal)), "")

    @property
    def prediction(self) -> dict[str, Any]:
        """What the file says of the item."""
        prediction: dict[str, Any] = self.asked.finish([self.results[number] for number in range(len(self.results))])
        return prediction

    @property
    def tokens(self) -> int:
        """Tokens that were generated, or read where there are only scores."""
        pairs = [(self.asked.requests[number], result) for number, result in self.results.items()]
        generated = [each.num_tokens for _, result in pairs if isinstance(result, list) for each in result]
        return sum(generated) + sum(len(asked.token_ids) for asked, result in pairs if isinstance(result, Tensor))


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
    trusts = module.backbone.trust_remote_code
    saved = None if checkpoint is None else read_saved(Path(checkpoint), trust_remote_code=trusts)
    served = served_model(Path(checkpoint), trusts) if checkpoint is not None else _untrained(module)
    data.setup("predict")
    write_reports(data.reports, writer.output_dir)
    needs = module.prepare_for_engine(saved, served.trained_folder)
    chosen = _defaults(module) | served.settings() | _demanded(needs) | settings
    arguments = engine_arguments(chosen)
    writer.engine = {"engine": {"name": "vllm", **{name: getattr(arguments, name) for name in DECIDES}}}
    writer.setup(trainer, module, "predict")
    batches = data.predict_dataloader()
    if len(batches) == 0:
        writer.teardown(trainer, module, "predict")
        return Summary()  # everything is there, and the writer has said so
    engine = VLLMEngine(arguments, module.tokenizer, network=needs.network)
    try:
        if needs.scores and needs.network is not None:
            (name,) = module.prediction_settings()
            asked = module.predict_requests(next(iter(batches)).items[:COMPARED], name)
            compare_scores(engine, TransformersEngine(needs.network, module.tokenizer, batch_size=1), asked)
        if served.adapter is not None:
            from vllm.lora.request import LoRARequest

            engine.lora = LoRARequest("trained", 1, served.adapter)
        summary = _answer(engine, _open_items(module, batches, writer), writer)
    finally:
        engine.close()
    writer.on_predict_end(trainer, module)
    print(f"{summary.prompts} prompts, {summary.tokens} tokens: {summary}")
    _report(summary.failed, writer.output_dir)
    writer.teardown(trainer, module, "predict")
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
        why = f"the virtual tokens of {type(module.peft_config).__name__} are not trained"
    elif module.head is not None and module.adapter is None and not _is_classifier(backbone.path):
        why = "the head is not trained"
    if why:
        raise ConfigError(f"nothing to predict with: {why}. Give --ckpt_path.")
    if module.adapter is not None:
        return served_model(Path(module.adapter.path).expanduser())
    return Served(local_path(backbone.path), revision=backbone.revision)


def _is_classifier(path: str) -> bool:
    return head_of(Path(local_path(path)).expanduser()) is not None


def _demanded(needs: EngineNeeds) -> dict[str, Any]:
    """What vLLM's engine must be told of what a method needs."""
    found: dict[str, Any] = {}
    if needs.scores:
        found |= {"runner": "pooling", "convert": "classify"}
    if needs.num_images:
        found["limit_mm_per_prompt"] = {"image": needs.num_images}
    if needs.embeddings:
        print("no LLaVA: its prompts go to vLLM as embeddings")
        found["enable_prompt_embeds"] = True
    return found


def _open_items(module: AlignmentModule, batches: Any, writer: PredictionWriter) -> Iterator[OpenItem]:
    """All items that a file lacks, made as they are asked for."""
    names = list(module.prediction_settings())
    for batch in batches:
        for name in names:
            items = [item for item in batch.items if writer.wants(name, item)]
            asked = module.predict_requests(items, name) if items else []
            for item, own in zip(items, asked, strict=True):
                yield OpenItem(name, item, own)


def compare_scores(engine: VLLMEngine, reference: TransformersEngine, asked: Sequence[ItemRequests]) -> None:
    """Compare raw scores with those of transformers in float32.

    Raises:
        ConfigError: If they differ by more than the engine's precision explains.
    """
    requests = [request for own in asked for request in own.requests]
    largest, scale = 0.0, 1.0
    for found, expected in zip(engine.generate(requests), reference.generate(requests), strict=True):
        if isinstance(found, Tensor) and isinstance(expected, Tensor):  # a refusal is said of its item later
            largest = max(largest, float((found - expected).abs().max()))
            scale = max(scale, float(expected.abs().max()))
    tolerance = TOLERANCE[engine.dtype] * scale
    if not largest <= tolerance:
        raise ConfigError(
            f"vLLM scores otherwise than transformers: a raw score of the first {len(asked)} records differs by "
            f"{largest:.3g} (allowed is {tolerance:.3g}). Use engine: transformers, or another vllm.dtype."
        )
    print(f"raw scores of {len(asked)} records differ from transformers' by at most {largest:.2g}")


def _defaults(module: AlignmentModule) -> dict[str, Any]:
    """As the transformers engine would compute; a CPU has no use for compiled graphs of so short a run."""
    half = "float32" if on_cpu() else "bfloat16"
    dtype = half if module.backbone.dtype == "auto" else module.backbone.dtype
    return {"dtype": dtype, "generation_config": "vllm", **({"enforce_eager": True} if on_cpu() else {})}


def _answer(engine: Engine, items: Iterable[OpenItem], writer: PredictionWriter) -> Summary:
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
        task = bar.add_task("starting", total=writer.missing())
        try:
            for request, result in engine.stream(request for item in items for request in item.requests()):
                item, number = request.owner
                item.results[number] = result
                if not item.done:
                    continue
                now = time.monotonic()
                summary.prompts += 1
                summary.tokens += 0 if item.problem else item.tokens
                summary.seconds = now - start
                if item.problem:
                    summary.failed.append((item.item, item.problem))
                else:
                    ready.setdefault(item.name, []).append((item.item, item.prediction))
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

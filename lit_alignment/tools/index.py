"""`lit-alignment index build` and `index eval`: passages -> embeddings -> an index, and how well it finds."""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from lit_alignment.callbacks.progress import progress
from lit_alignment.checkpoints.saved import read_saved
from lit_alignment.data.base import datamodule_of
from lit_alignment.data.encoding.messages import read_record, value_kind
from lit_alignment.data.examples import column
from lit_alignment.data.passages import Passage
from lit_alignment.data.retriever import PassageBatch, PassageDataModule
from lit_alignment.data.sources.readers import read_file
from lit_alignment.data.sources.record_batches import ROWS
from lit_alignment.errors import ConfigError, RecordError
from lit_alignment.files import replaced
from lit_alignment.metrics.retrieval import ranking_metrics
from lit_alignment.models.dual_encoder import (
    DUAL,
    DualEncoder,
    RetrieverConfig,
    load_retriever,
    load_towers,
    weights_hash,
)
from lit_alignment.modules.base import alignment_module
from lit_alignment.retrieval.build import IndexBuilder
from lit_alignment.retrieval.files import Manifest
from lit_alignment.retrieval.index import IndexConfig, PassageIndex
from lit_alignment.tools import parsers
from lit_alignment.trainer_cli import ToolCLI, build_for_tool

QUESTIONS_TOGETHER = 32


def main(arguments: list[str]) -> None:
    """Run `build` or `eval`."""
    options, rest = parsers.index().split(arguments)
    cli = build_for_tool(rest)
    retriever, index = cli.model.retrieval_config()
    if options.action == "build":
        build(cli, retriever, index, options)
    else:
        evaluate(retriever, index, options)


def build(cli: ToolCLI, retriever: RetrieverConfig, index: IndexConfig, options: argparse.Namespace) -> None:
    """Encode the passages with a Trainer on the configuration's devices, and write the index."""
    if not index.passages:
        raise ConfigError("model.index.passages is not set: give the sources of the passages.")
    if Path(index.path).expanduser().exists() and not options.overwrite:
        raise ConfigError(f"{index.path} exists. Choose another model.index.path, or add --overwrite.")
    texts = [(source.path, found) for source in index.passages if (found := source.texts()) is not None]
    module = cli.model.passage_encoder()
    module.load_model()
    if options.ckpt_path is not None:
        load_towers(dual_encoder(module), _trained(options.ckpt_path))
    data = PassageDataModule(
        module.tokenizer, predict=[*index.passages], batch_size=index.batch_size, packing=False, cache_dir=_cache(cli)
    )
    asked = cli.asked
    with TemporaryDirectory() as scratch:  # for the report on the passages, which is printed and belongs to no run
        trainer = Trainer(
            accelerator=asked["accelerator"],
            devices=asked["devices"],
            num_nodes=asked["num_nodes"],
            precision=asked["precision"],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=scratch,
            callbacks=[progress(), EmbeddingWriter(retriever, index)],
        )
        trainer.predict(module, data, return_predictions=False)
    if trainer.is_global_zero:
        print(_summary(index))
        for path, found in texts:
            print(f"  {path}: {found.line()}")
        most = retriever.passage_max_length
        if longer := int((column(data.examples["predict"], "length") > most).sum()):
            fix = "lower max_words of the source" if texts else "cut them into shorter ones"
            print(
                f"{longer} passages are longer than retriever.passage_max_length ({most} tokens), and lose their ends. "
                f"Raise it, or {fix}."
            )


def _summary(index: IndexConfig) -> str:
    """One line on an index that is built."""
    made, folder = PassageIndex.load(index.path), Path(index.path).expanduser()
    size = sum(file.stat().st_size for file in folder.iterdir())
    return (
        f"{index.path}: {len(made)} passages, vectors of {made.manifest.dimension} numbers in "
        f"{made.manifest.dtype}, {made.manifest.search} search  ({size / 1e6:.1f} MB)"
    )


class EmbeddingWriter(Callback):
    """Write an index of the passages that `predict` encodes; every rank writes its own rows.

    Args:
        retriever: The text encoder.
        index: Where, and of which kind.
    """

    def __init__(self, retriever: RetrieverConfig, index: IndexConfig) -> None:
        """Files are made when the run starts."""
        self.retriever, self.index = retriever, index
        self._builder: IndexBuilder | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make room for all embeddings."""
        encoder = dual_encoder(pl_module)
        rows = datamodule_of(trainer).examples["predict"]
        manifest = Manifest(
            encoder=self.retriever.decides_passages(),
            encoder_hash=weights_hash(encoder.passage_tower),
            dimension=encoder.width,
            dtype=self.index.dtype,
            count=len(rows),
        )
        self._builder = IndexBuilder(self.index, manifest)
        if trainer.is_global_zero:
            blocks = (rows.rows(range(i, min(i + ROWS, len(rows)))) for i in range(0, len(rows), ROWS))
            self._builder.create(Passage(row["id"], row["title"], row["text"]) for block in blocks for row in block)
        trainer.strategy.barrier("index")

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PassageBatch, *_: Any
    ) -> None:
        """Write the batch's rows."""
        if self._builder is not None:
            self._builder.write([item.index for item in batch.items], outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the index its name."""
        trainer.strategy.barrier("index")
        if self._builder is not None and trainer.is_global_zero:
            rank_zero_info(f"index: {self._builder.finish()}")
        trainer.strategy.barrier("index")


def dual_encoder(module: LightningModule) -> DualEncoder:
    """The network of a module that encodes passages.

    Raises:
        ConfigError: If it is no dual encoder.
    """
    network = alignment_module(module).network
    if not isinstance(network, DualEncoder):
        raise ConfigError(f"an index is built by a dual encoder, not by {type(network).__name__}.")
    return network


def _trained(checkpoint: Path) -> dict[str, Tensor]:
    """Weights of the towers in a checkpoint of a RAGModule or a RetrieverModule."""
    saved = read_saved(checkpoint)
    return saved.networks.get(DUAL) or saved.trained


def _cache(cli: ToolCLI) -> str | None:
    return str(cli.datamodule.cache_dir)


def evaluate(retriever: RetrieverConfig, index: IndexConfig, options: argparse.Namespace) -> None:
    """Recall, reciprocal rank and nDCG over questions whose relevant passages are known."""
    if options.queries is None:
        raise ConfigError(
            "index eval needs --queries FILE with records {query, relevant: [passage ids]}, or RAG's own."
        )
    ks = _cuts(options.k)
    found = PassageIndex.load(index.path)
    questions = read_questions(options.queries, set(found.passages["id"]))
    encoder = load_retriever(retriever)
    if options.ckpt_path is not None:
        load_towers(encoder, _trained(options.ckpt_path))
    encoder.eval()
    found.check_made_by(retriever.decides_passages(), weights_hash(encoder.passage_tower))
    metrics: list[dict[str, float]] = []
    groups = [questions[start : start + QUESTIONS_TOGETHER] for start in range(0, len(questions), QUESTIONS_TOGETHER)]
    for group in track(groups, "searching", transient=True, disable=not Console().is_terminal):
        with torch.no_grad():
            _, positions = found.search(encoder.queries([query for query, _ in group]), max(ks))
        for row, (_, relevant) in zip(positions, group, strict=True):
            metrics.append(ranking_metrics([passage.id for passage in found.at(row)], relevant, ks))
    means = {name: sum(m[name] for m in metrics) / len(metrics) for name in metrics[0]}
    table = Table("metric", "value")
    for name, value in means.items():
        table.add_row(name, f"{value:.4f}")
    print(f"{len(questions)} questions, {len(found)} passages")  # as a title it would be broken at the table's width
    Console().print(table)
    if options.json:
        with replaced(options.json) as file:
            file.write(json.dumps(means, indent=2) + "\n")


def _cuts(text: str) -> list[int]:
    try:
        ks = sorted({int(part) for part in text.split(",")})
    except ValueError:
        ks = [0]
    if ks[0] < 1:
        raise ConfigError(f"--k is '{text}'; give numbers from 1 on, with commas.")
    return ks


def read_questions(path: Path, known: set[str]) -> list[tuple[str, list[str]]]:
    """Questions and the ids of their relevant passages.

    Args:
        path: Records {query, relevant}, or records of RAGDataModule with `relevant`, whose last user message asks.
        known: Ids of the passages in the index.

    Raises:
        FileNotFoundError: If there is no such file.
        RecordError: Naming line and field.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file (looked from {Path.cwd()}). Check --queries.")
    questions = []
    for where, raw in read_file(path):
        values: dict[str, Any] = raw if isinstance(raw, dict) else {}
        query, relevant = values.get("query"), values.get("relevant")
        if query is None and ("prompt" in values or "messages" in values):  # a record that RAG trains on
            messages = read_record(raw, where, 0).messages
            query = next((message["content"] for message in reversed(messages) if message["role"] == "user"), None)
        if not isinstance(query, str) or not query:
            raise RecordError(where, "query", f"is {value_kind(query)}", "Give the question as a string.")
        if not isinstance(relevant, list) or not relevant:
            raise RecordError(where, "relevant", f"is {value_kind(relevant)}", "Give a list of passage ids.")
        ids = [str(each) for each in relevant]
        foreign = next((each for each in ids if each not in known), None)
        if foreign is not None:
            raise RecordError(where, "relevant", f"names '{foreign}', which is not in the index", "Check the ids.")
        questions.append((query, ids))
    if not questions:
        raise ConfigError(f"{path}: no questions.")
    return questions

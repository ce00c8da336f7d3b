"""`lit-alignment evaluate`: metrics of a predictions file, of answers, classes or rewards."""

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase

from lit_alignment.checkpoints.restore import restore
from lit_alignment.checkpoints.saved import read_saved
from lit_alignment.data.encoding.encoder import Encoder, EncodingConfig
from lit_alignment.data.encoding.messages import Record
from lit_alignment.data.encoding.templates import TemplateConfig
from lit_alignment.errors import ConfigError, RecordError
from lit_alignment.evaluation.answers import TEXT_METRICS, AnswerMetric, build_metric
from lit_alignment.evaluation.predictions import measure_classes, measure_rewards
from lit_alignment.evaluation.scoring import AnsweredPrompt, Scorer, read_documents
from lit_alignment.files import replaced
from lit_alignment.generation.prediction_file import Kind, kind_of_predictions, read_predictions
from lit_alignment.generation.reward_scorer import RewardScorer
from lit_alignment.models.loading import BackboneConfig, load_network, load_tokenizer
from lit_alignment.models.tokens import TokensConfig
from lit_alignment.terminal import Terminal
from lit_alignment.tools import parsers

Line = tuple[dict[str, Any], AnsweredPrompt]
PROMPTS_TOGETHER = 32
MOST_CLASSES = 12  # whose confusion a terminal shows
OF_ANSWERS = ("metrics", "vocabulary", "model", "base", "reward", "template", "per-record")


def main(arguments: list[str]) -> None:
    """Measure the predictions and print one table for each data set."""
    options = parsers.evaluate().parse_args(arguments)
    kind = kind_of_predictions(options.predictions[0])
    if kind == "classes" or (kind == "rewards" and not options.metrics):
        _evaluate_scores(options, kind)
    else:
        _evaluate_answers(options)


def _evaluate_scores(options: argparse.Namespace, kind: Kind) -> None:
    """Measure what a classifier or a reward model has predicted.

    Raises:
        ConfigError: If there is nothing to measure, or an option is given that is of answers.
    """
    if other := [name for name in OF_ANSWERS if getattr(options, name.replace("-", "_")) is not None]:
        raise ConfigError(f"--{other[0]}: {options.predictions[0]} holds {kind}, and this is of generated answers.")
    by_dataset: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for line, record in read_predictions(options.predictions, kind):
        by_dataset.setdefault(line["dataset"], []).append((record.where, line))
    measure = measure_classes if kind == "classes" else measure_rewards
    found = {dataset: measure(lines) for dataset, lines in by_dataset.items()}
    if not any(each.values for each in found.values()):
        raise ConfigError(f"{options.predictions[0]}: no predictions of records with a label.")
    console = Terminal()
    for dataset, measured in found.items():
        table = Table("metric", "value", "over", title=f"{dataset}, {len(by_dataset[dataset])} records")
        table.title_justify = "left"
        for name, value in measured.values.items():
            table.add_row(name, f"{value:.4g}", measured.counts[name])
        console.print(table)
        if measured.confusion is not None and len(measured.classes) <= MOST_CLASSES:
            console.print(_confusion(measured.classes, measured.confusion.tolist()))
    if options.json:
        _write(options.json, json.dumps({name: each.values for name, each in found.items()}, indent=2) + "\n")


def _confusion(classes: Sequence[str], counts: list[list[int]]) -> Table:
    table = Table("true \\ predicted", *classes, title_justify="left")
    for name, row in zip(classes, counts, strict=True):
        table.add_row(name, *map(str, row))
    return table


def _evaluate_answers(options: argparse.Namespace) -> None:
    """Measure generated answers."""
    names = [name.strip() for name in options.metrics.split(",")] if options.metrics else _default_metrics(options)
    built = [build_metric(name, options.ngram, options.vocabulary) for name in names]
    lines = [(line, _prompt(line, record)) for line, record in read_predictions(options.predictions)]
    if not lines:
        raise ConfigError(f"{options.predictions[0]}: no predictions.")
    network, encoder = None, None
    if options.model:
        network, tokenizer = _load(options.model)
        template = TemplateConfig(file=str(options.template) if options.template else None)
        encoder = Encoder(tokenizer, EncodingConfig(template=template))
    base = _load(options.base)[0] if options.base else None
    reward = RewardScorer(options.reward) if options.reward else None
    scorer = Scorer(names, encoder, network, base, reward)

    found: dict[str, list[AnswerMetric]] = {}
    rows = []
    groups = [lines[start : start + PROMPTS_TOGETHER] for start in range(0, len(lines), PROMPTS_TOGETHER)]
    for group in track(groups, "scoring", transient=True, disable=not Terminal().is_terminal):
        for (line, _), item in zip(group, scorer.score([prompt for _, prompt in group]), strict=True):
            metrics = found.setdefault(line["dataset"], copy.deepcopy(built))
            for metric in metrics:
                metric.update(item)
            values = {name: value for metric in metrics for name, value in metric.values(item).items()}
            rows.append({"id": line["id"], "dataset": line["dataset"], **values})
    console = Terminal()
    for dataset, metrics in found.items():
        number = sum(row["dataset"] == dataset for row in rows)
        console.print(_table(dataset, dict(zip(names, metrics, strict=True)), number))
    if options.per_record:
        _write(options.per_record, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        console.print(f"values of each record: {options.per_record}", soft_wrap=True)
    if options.json:
        means = {dataset: {k: v for m in metrics for k, v in m.compute().items()} for dataset, metrics in found.items()}
        _write(options.json, json.dumps(means, indent=2) + "\n")


def _default_metrics(options: argparse.Namespace) -> list[str]:
    names = list(TEXT_METRICS)
    if options.model:
        names.append("perplexity")
    if options.base:
        names.append("kl")
    if options.reward:
        names.append("reward")
    return names


def _prompt(line: dict[str, Any], record: Record) -> AnsweredPrompt:
    answers, where = line["answers"], record.where
    for answer in answers:
        if not isinstance(answer, dict) or not isinstance(answer.get("content"), str):
            raise RecordError(where, "answers", "holds one without a text 'content'", "Mend the line.")
    counts = [answer.get("num_tokens") for answer in answers]
    if not all(count is None or (isinstance(count, int) and count >= 0) for count in counts):
        raise RecordError(where, "answers", "holds one whose 'num_tokens' is no whole number", "Mend the line.")
    known = [count for count in counts if count is not None]
    meta = record.meta if isinstance(record.meta, dict) else {}
    return AnsweredPrompt(
        messages=record.messages,
        answers=[answer["content"] for answer in answers],
        finished=[answer.get("finish_reason", "stop") == "stop" for answer in answers],
        reference=record.label if isinstance(record.label, str) else None,
        num_tokens=known if len(known) == len(answers) else None,
        documents=read_documents(line.get("documents", meta.get("documents")), where),
    )


def _load(path: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A model from a checkpoint, an adapter folder, or anything that from_pretrained takes."""
    local = Path(path).expanduser()
    if local.is_file() or any((local / name).exists() for name in ("adapter_config.json", ".metadata", "latest")):
        saved = read_saved(local)
        network, tokenizer = restore(saved)
        if saved.chat_template is not None:
            tokenizer.chat_template = saved.chat_template  # what it was trained with, not what its base came with
        return network, tokenizer
    backbone = BackboneConfig(path)
    tokenizer, _ = load_tokenizer(backbone, TokensConfig())
    return load_network(backbone, tokenizer).eval(), tokenizer


def _table(dataset: str, metrics: dict[str, AnswerMetric], number: int) -> Table:
    """Values with what each is a mean over; metrics that no prompt has a value of stand below."""
    missing = [name for name, metric in metrics.items() if not metric.compute()]
    table = Table("metric", "value", "over", title=f"{dataset}, {number} prompts", title_justify="left")
    if missing:
        table.caption, table.caption_justify = f"no value: {', '.join(missing)}", "left"
    for metric in metrics.values():
        counts = dict(zip(metric.names, metric.counts.tolist(), strict=True))
        unit = "tokens" if metric.names == ("perplexity",) else "prompts"
        for name, value in metric.compute().items():
            table.add_row(name, f"{value:.4g}", f"{counts[name]:.0f} {unit}")
    return table


def _write(path: Path, text: str) -> None:
    with replaced(path) as file:
        file.write(text)

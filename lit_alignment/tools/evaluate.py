"""`lit-alignment evaluate`: metrics of a predictions file."""

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase

from lit_alignment.data.encode import Encoder, EncodingConfig
from lit_alignment.data.templates import TemplateConfig
from lit_alignment.errors import ConfigError, RecordError
from lit_alignment.generation.scoring import AnsweredPrompt, Scorer
from lit_alignment.metrics.answers import TEXT_METRICS, AnswerMetric, build_metric
from lit_alignment.models.loading import Backbone, load_causal_model, load_tokenizer
from lit_alignment.models.restoring import read_saved, restore
from lit_alignment.models.tokens import TokensConfig

Line = tuple[dict[str, Any], AnsweredPrompt]
PROMPTS_TOGETHER = 32


def main(arguments: list[str]) -> None:
    """Measure the answers and print one table for each data set."""
    options = _parser().parse_args(arguments)
    names = options.metrics.split(",") if options.metrics else _default_metrics(options)
    built = [build_metric(name, options.ngram, options.vocabulary) for name in names]
    lines = [line for path in options.predictions for line in read_predictions(path)]
    if not lines:
        raise ConfigError(f"{options.predictions[0]}: no predictions.")
    network, encoder = None, None
    if options.model:
        network, tokenizer = _load(options.model)
        template = TemplateConfig(file=str(options.template) if options.template else None)
        encoder = Encoder(tokenizer, EncodingConfig(template=template))
    base = _load(options.base)[0] if options.base else None
    scorer = Scorer(names, encoder, network, base, options.reward)

    found: dict[str, list[AnswerMetric]] = {}
    rows = []
    groups = [lines[start : start + PROMPTS_TOGETHER] for start in range(0, len(lines), PROMPTS_TOGETHER)]
    for group in track(groups, "scoring", transient=True, disable=not Console().is_terminal):
        for (line, _), item in zip(group, scorer.score([prompt for _, prompt in group]), strict=True):
            metrics = found.setdefault(line["dataset"], copy.deepcopy(built))
            for metric in metrics:
                metric.update(item)
            values = {name: value for metric in metrics for name, value in metric.values(item).items()}
            rows.append({"id": line["id"], "dataset": line["dataset"], **values})
    console = Console()
    for dataset, metrics in found.items():
        console.print(_table(dataset, metrics, sum(row["dataset"] == dataset for row in rows)))
    if options.per_record:
        _write(options.per_record, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        console.print(f"values of each record: {options.per_record}", soft_wrap=True)
    if options.json:
        means = {dataset: {k: v for m in metrics for k, v in m.compute().items()} for dataset, metrics in found.items()}
        _write(options.json, json.dumps(means, indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lit-alignment evaluate",
        description="Metrics of generated answers: exact_match, length, distinct, diversity, self_bleu, rouge; with "
        "models perplexity, kl, reward, retrieval_utility.",
    )
    parser.add_argument("predictions", type=Path, nargs="+", help="files that predict has written")
    parser.add_argument("--metrics", help="names, with commas (default: those that apply)")
    parser.add_argument("--ngram", type=int, default=3, help="largest n of distinct and self_bleu (default: 3)")
    parser.add_argument("--vocabulary", type=int, help="size for the expectation-adjusted form of distinct")
    parser.add_argument("--model", help="model, adapter folder or checkpoint, for perplexity, kl, retrieval_utility")
    parser.add_argument("--base", help="base model, for kl; an adapter's own base by default")
    parser.add_argument("--reward", help="reward model: a sequence classifier with one label")
    parser.add_argument("--template", type=Path, help="Jinja chat template, if not the model's own")
    parser.add_argument("--per-record", type=Path, help="write the values of each record as JSONL")
    parser.add_argument("--json", type=Path, help="write the means as JSON")
    return parser


def _default_metrics(options: argparse.Namespace) -> list[str]:
    names = list(TEXT_METRICS)
    if options.model:
        names.append("perplexity")
    if options.base:
        names.append("kl")
    if options.reward:
        names.append("reward")
    return names


def read_predictions(path: Path) -> Iterator[Line]:
    """The lines of a predictions file, with what is asked of models.

    Raises:
        RecordError: Naming the line and the field at fault.
    """
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                line = json.loads(text)
            except json.JSONDecodeError as error:
                raise RecordError(where, "", f"not valid JSON ({error.msg})", "Remove or mend the line.") from error
            if not isinstance(line, dict):
                raise RecordError(where, "", "is no object", "Give a file that predict has written.")
            for name, kind in (("id", (str, int)), ("messages", list), ("answers", list)):
                if not isinstance(line.get(name), kind):
                    raise RecordError(where, name, "is missing or wrong", "Give a file that predict has written.")
            yield {"dataset": path.stem, **line}, _prompt(line, where)


def _prompt(line: dict[str, Any], where: str) -> AnsweredPrompt:
    answers = line["answers"]
    if not answers:
        raise RecordError(where, "answers", "is empty", "Remove the line, or answer it again.")
    for answer in answers:
        if not isinstance(answer, dict) or not isinstance(answer.get("content"), str):
            raise RecordError(where, "answers", "holds one without a text 'content'", "Mend the line.")
    label, meta = line.get("label"), line.get("meta")
    counts = [answer["num_tokens"] for answer in answers if "num_tokens" in answer]
    documents = meta.get("documents", []) if isinstance(meta, dict) else []
    return AnsweredPrompt(
        messages=line["messages"],
        answers=[answer["content"] for answer in answers],
        finished=[answer.get("finish_reason", "stop") == "stop" for answer in answers],
        reference=label if isinstance(label, str) else None,
        num_tokens=counts if len(counts) == len(answers) else None,
        documents=line.get("documents") or documents,
    )


def _load(path: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A model from a checkpoint, an adapter folder, or anything that from_pretrained takes."""
    local = Path(path).expanduser()
    if local.is_file() or any((local / name).exists() for name in ("adapter_config.json", ".metadata")):
        return restore(read_saved(local))
    backbone = Backbone(path)
    tokenizer, _ = load_tokenizer(backbone, TokensConfig())
    return load_causal_model(backbone, tokenizer).eval(), tokenizer


def _table(dataset: str, metrics: list[AnswerMetric], number: int) -> Table:
    table = Table("metric", "value", "over", title=f"{dataset}, {number} prompts", title_justify="left")
    for metric in metrics:
        counts = dict(zip(metric.names, metric.counts.tolist(), strict=True))
        unit = "tokens" if metric.names == ("perplexity",) else "prompts"
        for name, value in metric.compute().items():
            table.add_row(name, f"{value:.4g}", f"{counts[name]:.0f} {unit}")
    return table


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")

"""Pairs, rankings and judged responses for preference optimisation."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_alignment.data.base import Split
from lit_alignment.data.batching.collate import TargetBatch, collate_responses
from lit_alignment.data.batching.items import PromptBatch
from lit_alignment.data.batching.loader import PlannedLoader
from lit_alignment.data.batching.packing import BatchPlan, PlannedBatch
from lit_alignment.data.conversation import ConversationDataModule
from lit_alignment.data.encoding.example import Dropped, Example
from lit_alignment.data.encoding.feedback import RESPONSES, Feedback
from lit_alignment.data.encoding.messages import IGNORE_INDEX, Record, read_record, without_answer
from lit_alignment.data.encoding.prompts import PROMPT_FEATURES, Item, prompt_item, prompt_row
from lit_alignment.data.examples import column
from lit_alignment.data.feedback import IDS, FeedbackDataModule
from lit_alignment.data.sft import SFTDataModule
from lit_alignment.data.sources.record_batches import CachedRows, IndexedRows
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError

Compared = Literal["all_pairs", "best_and_worst"]
VALIDATION_BLOCK = 64  # records among which a validation looks for mismatched responses


@dataclass(frozen=True)
class ChatSource(SourceConfig):
    """A source of conversations without a judgement.

    Args:
        holds: What its records are, so that the same file as a source of judged responses is cached apart.
    """

    holds: str = "chats"


@dataclass(kw_only=True)
class PreferenceBatch(TargetBatch):
    """Responses with what is known of them, in the order of records and responses, and behind them plain chats.

    `lengths` and `groups` are of the responses alone.

    S responses, P pairs

    Args:
        counts: Number of targets of each response, [S].
        scores: How good each response is, higher is better, [S].
        chosen: Index of the better response of each pair, [P].
        rejected: Index of the other, [P].
        desirable: Index of each good response, [G].
        undesirable: Of each other one, [S - G].
        margins: How far apart the pairs should be, [P]; NaN where the record does not say.
        dummy: Whether it only keeps its rank in step with the others.
        reference: Log-probabilities of the targets under the reference, [N], where they were computed before.
        baseline: What the KL estimate of its optimizer step, or validation batch, is taken over; empty where another
            micro-batch has it, or the loss needs none.
        window_chat_tokens: Weight of the tokens of all chats of the optimizer step.
    """

    counts: Tensor
    scores: Tensor
    chosen: Tensor
    rejected: Tensor
    desirable: Tensor
    undesirable: Tensor
    margins: Tensor
    dummy: bool = False
    reference: Tensor | None = None
    baseline: "list[PreferenceBatch]" = field(default_factory=list)
    window_chat_tokens: float = 0.0

    @property
    def num_judged(self) -> int:
        """Targets of responses, which stand before those of chats."""
        return sum(self.lengths)


class PreferenceDataModule(FeedbackDataModule):
    """Pairs and rankings, or responses judged alone, as the tokens of their responses behind one prompt each.

    Records are those that `read_feedback` knows. `predict` answers the prompts of the same records, and conversations.

    Args:
        tokenizer: The model's tokenizer.
        kind: `preferences` compares the responses of a record, `outcomes` judges each response alone (KTO), those of
            pairs too.
        share_prompts: In a packed row, read a prompt once for all its responses.
        compared: Of a ranking, compare all responses that differ, or the best with the worst alone.
        chats: Sources of plain conversations, which train beside those of `train` as in supervised fine-tuning.
        **settings: As of AlignmentDataModule.

    Attributes:
        baseline: What batches bring along for a KL estimate: each prompt with another one's response, the responses of
            the whole optimizer step, or nothing. The module says.
        compute_reference: Gives log-probabilities of a split's targets under the reference, row by row; the module's.
    """

    streams = True
    baseline: Literal["mismatched", "other_side"] | None = None
    compute_reference: Callable[[Split], CachedRows] | None = None

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        kind: Literal["preferences", "outcomes"] = "preferences",
        share_prompts: bool = True,
        compared: Compared = "all_pairs",
        chats: list[SourceConfig] | None = None,
        **settings: Any,
    ) -> None:
        """Check the settings; files are read in `prepare_data`."""
        super().__init__(tokenizer, kind, share_prompts, **settings)
        self.compared, self.chats = compared, [ChatSource(**vars(source)) for source in chats or []]
        if self.chats and self.streaming:
            raise ConfigError(
                "data.chats are mixed with pairs by the number of both, which streaming does not know. Remove them, or "
                "set data.streaming to false."
            )
        if self.sources["train"]:
            self.sources["train"] = [*self.sources["train"], *self.chats]
        self.references: dict[str, CachedRows] = {}

    def decides_encoding(self) -> list[Any]:
        """Also which responses are compared, which decides the number of pairs."""
        return [*super().decides_encoding(), self.compared]

    @property
    def features(self) -> datasets.Features:
        """Columns of an encoded record; `trained` holds begins and ends of what counts in each response."""
        number, weight = datasets.Value("int64"), datasets.Value("float64")
        chats = {"token_weights": datasets.List(datasets.Value("float32")), "chat_tokens": weight}
        return datasets.Features({**super().features, "trained": datasets.List(IDS), "num_trained": number, **chats})

    def setup(self, stage: str) -> None:
        """Also refuse to train on chats alone."""
        super().setup(stage)
        if stage == "fit" and self.stream is None and not column(self.examples["train"], "weight").any():
            raise ConfigError("data.train: only chats are left. Change what drops the records, or use SFTModule.")

    def plan(self, split: Split) -> BatchPlan:
        """Also how many tokens of chats there are."""
        return replace(super().plan(split), chat_tokens=column(self.examples[split], "chat_tokens"))

    def validates(self, source: SourceConfig) -> bool:
        """Chats train alone."""
        return not isinstance(source, ChatSource)

    def reader(self, source: SourceConfig) -> Callable[[object, str, int], Any]:
        """Chats are read as in supervised fine-tuning."""
        return read_record if isinstance(source, ChatSource) else self.read

    def split_record(self, record: Record) -> list[Record]:
        """Of a chat a record for each trained response."""
        return [] if isinstance(record, Feedback) else self.encoder.split_turns(record)

    def encode_record(self, record: Record, source: SourceConfig) -> dict[str, Any]:
        """Ids of one record's prompt and responses, their scores, and what of them counts; a chat has no scores."""
        if not isinstance(record, Feedback):
            return _chat_columns(self.encoder.encode(record, source.system_prompt))
        columns = super().encode_record(record, source)
        spans = columns["trained"]
        pairs = self.pairs(columns["scores"])
        return columns | {
            "margin": float("nan") if record.margin is None else record.margin,
            "weight": float(len(pairs) if self.kind == "preferences" else len(spans)),
            "num_trained": sum(end - begin for own in spans for begin, end in zip(own[::2], own[1::2], strict=True)),
            "token_weights": [],
            "chat_tokens": 0.0,
        }

    def scores(self, record: Feedback) -> list[float]:
        """The score of each response; of a pair that is judged alone the chosen one is good, and the other bad."""
        pair = [(response["id"], response["score"]) for response in record.responses]
        if self.kind != "outcomes" or pair != [("chosen", 1.0), ("rejected", 0.0)]:
            return super().scores(record)
        if record.responses[0]["messages"] == record.responses[1]["messages"]:
            raise Dropped("nothing_to_prefer")
        return [1.0, 0.0]

    def sequences(self, record: Feedback, source: SourceConfig, allow_empty: bool = False) -> dict[str, Any]:
        """Also `trained`."""
        if record.steps:
            raise Dropped("judged_steps", "steps are for reward models")
        return super().sequences(record, source, allow_empty)

    def response_columns(self, examples: list[Example], start: int) -> dict[str, Any]:
        """Begins and ends of the tokens that count in each response, which begins at `start`."""
        return {"trained": [_spans(example.labels[start:]) for example in examples]}

    def pairs(self, scores: list[float]) -> list[tuple[int, int]]:
        """Indices of the better and the worse response of each pair of a record; none if its response is judged alone.

        Args:
            scores: Of its responses.
        """
        if self.compared == "best_and_worst" and len(scores) > 1:
            return [(scores.index(max(scores)), scores.index(min(scores)))]
        number = range(len(scores))
        return [(i, j) for i in number for j in number if scores[i] > scores[j]]

    def collate(self, rows: list[dict[str, Any]], planned: PlannedBatch) -> PreferenceBatch:
        """All responses of the records, in one packed row or padded."""
        rows = sorted(rows, key=lambda row: not row["scores"])  # chats last
        pad = None if self.packing else int(self.tokenizer.pad_token_id)
        batch = collate_responses([_examples(row) for row in rows], pad, self.share_prompts, planned.window_weight)
        chosen, rejected, margins, first = [], [], [], 0
        for row in rows:
            for better, worse in self.pairs(row["scores"]):
                chosen.append(first + better)
                rejected.append(first + worse)
                margins.append(row["margin"])
            first += len(row["scores"])
        ids, lengths = [f"{row['dataset']}/{row['id']}" for row in rows], batch.lengths[:first]
        scores = [score for row in rows for score in row["scores"]]
        groups = [len(row["scores"]) for row in rows if row["scores"]]
        return PreferenceBatch(
            **vars(batch) | {"ids": ids, "lengths": lengths, "groups": groups},
            counts=torch.tensor(lengths, dtype=torch.long),
            scores=torch.tensor(scores),
            chosen=torch.tensor(chosen, dtype=torch.long),
            rejected=torch.tensor(rejected, dtype=torch.long),
            desirable=torch.tensor([i for i, score in enumerate(scores) if score > 0], dtype=torch.long),
            undesirable=torch.tensor([i for i, score in enumerate(scores) if score <= 0], dtype=torch.long),
            margins=torch.tensor(margins),
            dummy=planned.dummy,
            window_chat_tokens=planned.window_chat_tokens,
        )

    # What the module adds to batches.

    def _loader(self, split: Any) -> PlannedLoader[Any]:
        if self.compute_reference is not None:
            self.references[split] = self.compute_reference(split)
        return super()._loader(split)

    def _batch(self, rows: IndexedRows, planned: PlannedBatch) -> PreferenceBatch:
        batch: PreferenceBatch = super()._batch(rows, planned)
        references = next((found for split, found in self.references.items() if self.examples.get(split) is rows), None)
        batch.reference = _reference(references, planned.indices)
        if self.baseline is None:
            return batch
        window = None if planned.window is None else [index for group in planned.window for index in group]
        for group in planned.own_window:
            records = self._compared_rows(rows, group, window)
            own = self.collate(records or rows.rows(planned.indices[:1]), PlannedBatch([], 0.0, dummy=not records))
            own.reference = _reference(references, group or planned.indices[:1])
            batch.baseline.append(own)
        return batch

    def _compared_rows(self, rows: IndexedRows, group: list[int], window: list[int] | None) -> list[dict[str, Any]]:
        """What of a micro-batch the KL estimate is taken over.

        Args:
            rows: All of the split.
            group: Records of the micro-batch.
            window: Records of the whole optimizer step; None where there are no steps.
        """
        if self.baseline == "other_side" or not group:
            return rows.rows(group)
        if window is None:  # neighbours in the order of records, whatever the size of a batch
            blocks = {index // VALIDATION_BLOCK * VALIDATION_BLOCK for index in group}
            window = [i for start in blocks for i in range(start, min(start + VALIDATION_BLOCK, len(rows)))]
        order = np.random.default_rng([self.seed, *sorted(set(window))]).permutation(sorted(set(window))).tolist()
        known = dict(zip(order, rows.rows(order), strict=True))
        found = []
        for index in group:
            own, start = known[index], order.index(index)
            others = (known[other] for other in order[start + 1 :] + order[:start])
            partner = next((other for other in others if not _share_text(own, other)), None)
            if partner is not None:
                found += _behind(own, partner, self.encoding.max_length)
        return found

    def views(self, row: dict[str, Any]) -> list[tuple[str, Example]]:
        """Each response behind its prompt, with what is known of it; marked are the tokens that count."""
        if "responses" not in row:
            return ConversationDataModule.views(self, row)
        names = self._names(row["scores"])
        return list(zip(names, _examples(row), strict=True))

    def _names(self, scores: list[float]) -> list[str]:
        if not scores:
            return ["chat"]
        if self.kind == "outcomes":
            return [f"{'good' if score else 'bad'} response" for score in scores]
        if len(scores) == 2:
            return ["chosen" if score == max(scores) else "rejected" for score in scores]
        return [f"response {number}, rank {1 + sum(o > s for o in scores)}" for number, s in enumerate(scores)]

    # What predict answers.

    def read_prompt(self, raw: object, where: str, position: int) -> Feedback:
        """A prompt with its responses, or a conversation of which nothing is judged."""
        if isinstance(raw, dict) and not any(name in raw for name in RESPONSES):
            return Feedback(**vars(read_record(without_answer(raw), where, position)))
        return self.read(raw, where, position)

    @property
    def predict_features(self) -> datasets.Features:
        """Columns of a prompt."""
        return PROMPT_FEATURES

    def predict_row(self, record: Feedback, source: SourceConfig) -> dict[str, Any]:
        """The prompt of a record, with the first turn of its best response as reference."""
        known = [response for response in record.responses if response["score"] is not None]
        best = max(known, key=lambda response: response["score"] or 0.0)["messages"][:1] if known else []
        return prompt_row(self.encoder, replace(record, messages=[*record.messages, *best]), source)

    def predict_item(self, row: dict[str, Any], index: int) -> Item:
        """One prompt."""
        return prompt_item(row, index)

    def predict_collate(self, items: list[Any]) -> PromptBatch:
        """Prompts to answer together."""
        return PromptBatch(items)


def _reference(references: CachedRows | None, indices: list[int]) -> Tensor | None:
    """The log-probabilities of some records' targets, [N]."""
    if references is None:
        return None
    judged = [index for index in indices if references.positions[index] >= 0]
    return torch.tensor([value for row in references.rows(judged) for value in row["logps"]])


def _chat_columns(example: Example) -> dict[str, Any]:
    """The columns of a plain chat: all of it stands as one response to an empty prompt."""
    columns = SFTDataModule.columns(example)
    return {
        **{name: columns[name] for name in ("length", "num_trained", "notes")},
        "prompt": [],
        "responses": [example.input_ids],
        "trained": [_spans(example.labels)],
        "token_weights": example.weights,
        "chat_tokens": columns["weight"],
        "scores": [],
        "margin": float("nan"),
        "subset": "",
        "weight": 0.0,  # as no pair, nor judged response
    }


def _spans(labels: list[int]) -> list[int]:
    """Begins and ends of the runs of labels that count, alternately."""
    counts = [False, *(label != IGNORE_INDEX for label in labels), False]
    return [position for position, (before, now) in enumerate(pairwise(counts)) if before != now]


def _share_text(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two records have the prompt or a response in common: a mismatched pair could then be a matched one."""
    return row["prompt"] == other["prompt"] or any(response in row["responses"] for response in other["responses"])


def _behind(row: dict[str, Any], other: dict[str, Any], max_length: int) -> list[dict[str, Any]]:
    """Another record's responses behind a record's prompt, cut at `max_length`; none if nothing of them is left."""
    room, responses, trained = max_length - len(row["prompt"]), [], []
    for response, spans in zip(other["responses"], other["trained"], strict=True):
        cut = [min(position, max(room, 0)) for position in spans]
        if any(begin < end for begin, end in zip(cut[::2], cut[1::2], strict=True)):
            responses.append(response[: max(room, 0)])
            trained.append(cut)
    return [{**row, "responses": responses, "trained": trained, "scores": [0.0] * len(responses)}] if responses else []


def _examples(row: dict[str, Any]) -> list[Example]:
    """The prompt with each of its responses."""
    examples = []
    for response, spans in zip(row["responses"], row["trained"], strict=True):
        ids, start = row["prompt"] + response, len(row["prompt"])
        labels = [IGNORE_INDEX] * len(ids)
        for begin, end in zip(spans[::2], spans[1::2], strict=True):
            labels[start + begin : start + end] = response[begin:end]
        weights = row["token_weights"] or [0.0 if label == IGNORE_INDEX else 1.0 for label in labels]
        examples.append(Example(ids, labels, weights))
    return examples

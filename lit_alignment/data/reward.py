"""Responses and how good they are, for reward models."""

from dataclasses import dataclass, replace
from typing import Any, get_args

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from lit_alignment.data.batching.collate import ScoreBatch, Sequences, pack_sequences, pad_sequences
from lit_alignment.data.batching.items import ItemBatch
from lit_alignment.data.batching.packing import PlannedBatch
from lit_alignment.data.encoding.example import Example
from lit_alignment.data.encoding.feedback import Feedback, ScoredResponse
from lit_alignment.data.encoding.messages import IGNORE_INDEX, Message
from lit_alignment.data.feedback import IDS, FeedbackDataModule, FeedbackItem, FeedbackKind
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import RecordError
from lit_alignment.moved import renamed

# Positions in each response whose scores are read: its last token, or the ends of its steps.
READ_AT = {"read_at": datasets.List(IDS)}


@dataclass(kw_only=True)
class ResponsesItem(FeedbackItem):
    """A prompt with responses to score.

    Args:
        read_at: Positions in each response whose scores are read.
    """

    read_at: list[list[int]]


class RewardDataModule(FeedbackDataModule):
    """Preferences (pairs and rankings), judged responses, or judged steps, as batches of sequences to score.

    Args:
        tokenizer: The model's tokenizer.
        kind: What is known: `preferences` compares the responses of a record, `outcomes` judges each response alone,
            `steps` judges each step of a response.
        share_prompts: In a packed row, read a prompt once for all its responses.
        step_separator: What closes each step of `steps`.
        **settings: As of AlignmentDataModule.
    """

    marked = "scored"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        kind: FeedbackKind = "preferences",
        share_prompts: bool = True,
        step_separator: str = "\n\n",
        **settings: Any,
    ) -> None:
        """Check the settings; files are read in `prepare_data`."""
        super().__init__(tokenizer, kind, share_prompts, **settings)
        self.step_separator = step_separator

    def asking_settings(self) -> dict[str, Any]:
        """Also whether responses or their steps are judged, and what closes a step."""
        return {**super().asking_settings(), "kind": self.kind, "step_separator": self.step_separator}

    @classmethod
    def read_asking_settings(cls, values: dict[str, Any], where: object) -> dict[str, Any]:
        """The same."""
        found = super().read_asking_settings(values, where)
        if values.get("kind") in get_args(FeedbackKind):
            found["kind"] = values["kind"]
        if isinstance(values.get("step_separator"), str):
            found["step_separator"] = values["step_separator"]
        return found

    def decides_encoding(self) -> list[Any]:
        """Also what closes a step."""
        return [*super().decides_encoding(), self.step_separator]

    @property
    def features(self) -> datasets.Features:
        """Columns of an encoded record."""
        return datasets.Features({**super().features, **READ_AT})

    @property
    def predict_features(self) -> datasets.Features:
        """Columns of a record whose responses are scored."""
        return datasets.Features({**super().predict_features, **READ_AT})

    def encode_record(self, record: Feedback, source: SourceConfig) -> dict[str, Any]:
        """Ids of one record's prompt and responses, and what the scores should be, or say of each other."""
        columns = super().encode_record(record, source)
        if self.kind == "steps":  # every step weighs the same
            columns["weight"] = float(len(columns["scores"]))
        return columns

    def scores(self, record: Feedback) -> list[float]:
        """One score for each position that is read."""
        if self.kind != "steps":
            return super().scores(record)
        if not record.step_labels:
            raise RecordError(record.where, "labels", "is missing", "Give 'steps' with 'labels', or set data.kind.")
        return record.step_labels

    def sequences(self, record: Feedback, source: SourceConfig, allow_empty: bool = False) -> dict[str, Any]:
        """Also `read_at`; a response made of steps stands whole behind an empty prompt, since it shares none."""
        if record.steps:
            if self.kind != "steps":
                problem = f"is there, which data.kind: {self.kind} does not take"
                raise RecordError(record.where, "steps", problem, "Set data.kind to what the records hold.")
            ids, places = self.encoder.encode_steps(record, record.steps, self.step_separator, source.system_prompt)
            return {"length": len(ids), "prompt": [], "responses": [ids], "read_at": [places]}
        columns = super().sequences(record, source, allow_empty)
        return columns | {"read_at": [[len(response) - 1] for response in columns["responses"]]}

    def collate(self, rows: list[dict[str, Any]], planned: PlannedBatch) -> ScoreBatch:
        """All responses of the records, in one packed row or padded."""
        batch = self._score_batch(
            [Sequences(row["prompt"], row["responses"]) for row in rows], [row["read_at"] for row in rows]
        )
        batch.targets = torch.tensor([score for row in rows for score in row["scores"]])
        batch.margins = torch.tensor([row["margin"] for row in rows])
        if self.kind == "preferences":
            batch.pairs = _pairs([row["scores"] for row in rows])
        batch.weights = torch.full((len(rows),), 0.0 if planned.dummy else 1.0)
        batch.subsets = [row["subset"] for row in rows]
        batch.window_weight = planned.window_weight
        batch.ids = [f"{row['dataset']}/{row['id']}" for row in rows]
        return batch

    def _score_batch(self, items: list[Sequences], read_at: list[list[list[int]]]) -> ScoreBatch:
        if self.packing:
            rows, begins = pack_sequences(items, self.share_prompts)
        else:
            rows, begins = pad_sequences(items, int(self.tokenizer.pad_token_id))
        places = [place for record in read_at for place in record]
        return ScoreBatch(
            **vars(rows),
            read_at=torch.tensor([begin + p for begin, ps in zip(begins, places, strict=True) for p in ps]),
            targets=torch.zeros(0),
            groups=[sum(map(len, record)) for record in read_at],
            weights=torch.ones(len(items)),
        )

    def views(self, row: dict[str, Any]) -> list[tuple[str, Example]]:
        """Each response behind its prompt, with its rank or labels; marked are the tokens at which a score is read."""
        views = []
        known = self._shown(row.get("scores", []))
        for number, (response, places) in enumerate(zip(row["responses"], row["read_at"], strict=True)):
            ids = row["prompt"] + response
            labels = [IGNORE_INDEX] * len(ids)
            for place in places:
                labels[len(row["prompt"]) + place] = ids[len(row["prompt"]) + place]
            own = known if self.kind == "steps" else known[number : number + 1]
            views.append((f"response {number} ({', '.join(own)})", Example(ids, labels, [1.0] * len(ids))))
        return views

    def _shown(self, scores: list[float]) -> list[str]:
        """Ranks of responses that are compared, 1 for the best, or the scores of those that are judged."""
        if self.kind == "preferences":
            return [str(1 + sum(other > score for other in scores)) for score in scores]
        return [f"{score:g}" for score in scores]

    # What predict scores.

    def predict_row(self, record: Feedback, source: SourceConfig) -> dict[str, Any]:
        """Ids of a record's prompt and responses, and the record itself."""
        if record.steps:
            content = "".join(step + self.step_separator for step in record.steps)
            response: Message = {"role": "assistant", "content": content}
            whole: ScoredResponse = {"id": "0", "messages": [response], "score": None}
            record = replace(record, responses=[whole])
        return super().predict_row(record, source)

    def predict_item(self, row: dict[str, Any], index: int) -> ResponsesItem:
        """One row of `predict_features`."""
        return ResponsesItem(**vars(super().predict_item(row, index)), read_at=row["read_at"])

    def predict_collate(self, items: list[Any]) -> ItemBatch:
        """All responses of the records, to score in one forward pass."""
        return ItemBatch(items, self._score_batch([i.sequences for i in items], [i.read_at for i in items]))


def _pairs(scores: list[list[float]]) -> torch.Tensor:
    """Positions of the better and of the worse score of each record with two, and the record, [3, P].

    Args:
        scores: Of each record.
    """
    pairs, first = [], 0
    for record, own in enumerate(scores):
        if len(own) == 2:
            pairs.append((first + own.index(max(own)), first + own.index(min(own)), record))
        first += len(own)
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 3).T.contiguous()


def __getattr__(name: str) -> Any:
    return renamed(__name__, name)

"""Prompts to which responses are sampled in training, at each optimizer step or every few, with the weights of then.

N trained tokens, B answers
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, Protocol

import datasets
import torch
import torch.distributed as dist

from lit_alignment.data.base import Split
from lit_alignment.data.batching.collate import TargetBatch, collate_responses
from lit_alignment.data.batching.items import PromptBatch
from lit_alignment.data.batching.loader import PlannedLoader
from lit_alignment.data.batching.packing import BatchPlan, PlannedBatch
from lit_alignment.data.batching.standing import standing
from lit_alignment.data.conversation import ConversationDataModule
from lit_alignment.data.encoding.example import Example
from lit_alignment.data.encoding.messages import IGNORE_INDEX, Record, read_record, without_answer
from lit_alignment.data.encoding.prompts import PROMPT_FEATURES, prompt_item, prompt_row
from lit_alignment.data.sources.record_batches import IndexedRows
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError, present


@dataclass(kw_only=True)
class Answer:
    """One response of a rollout.

    Args:
        token_ids: Its tokens, with the one that ends the turn.
        text: Its text.
        truncated: Whether it was cut at the limit.
        rewards: What each reward function gives, by name; NaN where it gives none.
        reward: Their weighted sum; NaN where none gives one.
        sampler_logps: Log-probability of each token under what it was sampled from; None if that is the policy itself.
        old_logps: The same under the policy of then, where steps that follow are compared with it.
        advantage: How much better than the others it is.
        weights: Weight of each token in the loss, which leaves out those of weight 0; None means 1.
    """

    token_ids: list[int]
    text: str
    truncated: bool
    rewards: dict[str, float] = field(default_factory=dict)
    reward: float = float("nan")
    sampler_logps: list[float] | None = None
    old_logps: list[float] | None = None
    advantage: float = 0.0
    weights: list[float] | None = None

    @property
    def weight(self) -> float:
        """Of all its tokens."""
        return float(len(self.token_ids)) if self.weights is None else sum(self.weights)

    @property
    def scores(self) -> dict[str, float]:
        """What was scored, by the names in logs: the reward, and of several functions what each gives."""
        of_each = {f"reward_{name}": own for name, own in self.rewards.items()} if len(self.rewards) > 1 else {}
        return {name: own for name, own in ({"reward": self.reward} | of_each).items() if not math.isnan(own)}


@dataclass(kw_only=True)
class Group:
    """All responses to one prompt.

    Args:
        index: Of the record among those of the training data.
        prompt: Token ids.
        answers: The responses.
    """

    index: int
    prompt: list[int]
    answers: list[Answer]

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "Group":
        """A group from plain values, as `asdict` gives them."""
        return cls(**plain | {"answers": [Answer(**answer) for answer in plain["answers"]]})


class RolloutSource(Protocol):
    """What makes rollouts: the module that trains on them."""

    def roll_out(self, rows: list[dict[str, Any]], indices: Sequence[int]) -> list[Group]:
        """Responses to prompts, with the weights of now.

        Args:
            rows: The prompts.
            indices: Of the records.
        """

    def weigh(self, groups: list[Group]) -> Any:
        """Weigh the answers of an optimizer step against each other, and say what its loss is divided by, on all ranks.

        Args:
            groups: This rank's.
        """


@dataclass(kw_only=True)
class RolloutBatch(TargetBatch):
    """Responses of a rollout behind their prompts.

    Args:
        counts: Number of targets of each answer, [B].
        old_logps: Of each target under the policy of the rollout, [N]; None if that is the policy of now.
        sampler_logps: Of each target under what sampled it, [N]; None if that is the policy of the rollout.
        advantages: Of each answer, [B].
        truncated: Whether it was cut, [B].
        scored: Whether it has a reward, [B].
        step: What `weigh` says of the optimizer step.
    """

    counts: torch.Tensor
    old_logps: torch.Tensor | None
    sampler_logps: torch.Tensor | None
    advantages: torch.Tensor
    truncated: torch.Tensor
    scored: torch.Tensor
    step: Any


@dataclass
class PromptRecord(Record):
    """A conversation with its record as it was written.

    Args:
        raw: The record.
    """

    raw: dict[str, Any] = field(default_factory=dict)


class RolloutDataModule(ConversationDataModule):
    """Prompts of chat records; what answers the training prompts is the module that trains.

    A record is one of the chat forms that `read_record` knows; its last response, if it has one, is left out of the
    prompt. All fields of a record, also others, are there for what scores the responses.

    Args:
        tokenizer: The model's tokenizer.
        share_prompts: In a packed row, read a prompt once for all its responses.
        **settings: As of AlignmentDataModule; `batch_size` is the prompts of a micro-batch.
    """

    def __init__(self, *arguments: Any, share_prompts: bool = True, **settings: Any) -> None:
        """Check the settings; files are read in `prepare_data`."""
        super().__init__(*arguments, **settings)
        self.share_prompts = share_prompts
        self.source: RolloutSource | None = None  # the module, which also says the next
        self.steps_per_rollout = 1
        self._planned: list[PlannedBatch] = []  # of the epoch, on this rank
        self._at = 0  # the first of them in the step that has begun
        self._groups: dict[int, Group] = {}  # of the last rollout, by record
        self._epoch = -1  # in which it was made
        self._steps: list[list[int]] = []  # records of the step that has begun, and of those after it
        self._first_batch = math.inf  # of the step that has begun, on this rank
        self._step: Any = None  # what `weigh` says of it

    def check_settings(self) -> None:
        """Also refuse workers, which have not the model."""
        super().check_settings()
        if self.num_workers:
            raise ConfigError(f"data.num_workers is {self.num_workers}; responses are sampled in training: use 0.")

    def begin(self) -> None:
        """Also forget an earlier run's rollout."""
        super().begin()
        self._groups, self._epoch, self._steps, self._first_batch = {}, -1, [], math.inf

    @property
    def rollout(self) -> list[Group]:
        """All responses of the last rollout on this rank."""
        return list(self._groups.values())

    # Prompts.

    def read(self, raw: object, where: str, position: int) -> Record:
        """One conversation, with all fields of its record."""
        if not isinstance(raw, dict):
            return read_record(raw, where, position)
        return PromptRecord(**vars(read_record(without_answer(raw), where, position)), raw=raw)

    @property
    def features(self) -> datasets.Features:
        """Columns of a training prompt."""
        own = {"weight": datasets.Value("float64"), "record": datasets.Value("string")}
        return datasets.Features({**PROMPT_FEATURES, **own})

    def encode_record(self, record: PromptRecord, source: SourceConfig) -> dict[str, Any]:
        """The prompt of a conversation."""
        columns = prompt_row(self.encoder, record, source)
        messages = json.loads(columns["messages"])
        if columns["reference"] is not None:
            messages.append({"role": "assistant", "content": columns["reference"]})
        whole = {**record.raw, "id": record.id, "messages": messages}
        return columns | {"weight": 1.0, "record": json.dumps(whole)}

    def plan(self, split: Split) -> BatchPlan:
        """Micro-batches of so many prompts; how long the responses become is not known yet."""
        return replace(super().plan(split), tokens_per_batch=None)

    # Batches.

    def val_dataloader(self) -> PlannedLoader[Any] | list[Any]:
        """Prompts to answer, in order; none without sources."""
        return self._prompt_loader("val") if "val" in self.examples else []

    def test_dataloader(self) -> PlannedLoader[Any]:
        """Prompts to answer, in order."""
        return self._prompt_loader("test")

    def _prompt_loader(self, split: Split) -> PlannedLoader[Any]:
        loader = self._loader(split)
        loader.build = partial(self._asked, self.examples[split])
        return loader

    def _asked(self, rows: IndexedRows, planned: PlannedBatch) -> PromptBatch:
        own = [] if planned.dummy else planned.indices
        items = [prompt_item(row, index) for row, index in zip(rows.rows(own), own, strict=True)] if own else []
        return PromptBatch(items)

    def records(self, split: Split, indices: Sequence[int]) -> tuple[list[str], list[dict[str, Any]]]:
        """Names of prompts, and their records with all fields, and with the messages that the model sees.

        Args:
            split: Of the data.
            indices: Which of its records.
        """
        rows = self.examples[split].rows(indices) if indices else []
        return [f"{row['dataset']}/{row['id']}" for row in rows], [json.loads(row["record"]) for row in rows]

    def _loader(self, split: str) -> PlannedLoader[Any]:
        loader = super()._loader(split)
        if split == "train":
            loader.plan = partial(self._keep, loader.plan)
        return loader

    def _keep(self, plan: Callable[[int], list[PlannedBatch]], epoch: int) -> list[PlannedBatch]:
        self._planned, self._at = plan(epoch), 0
        if epoch != self._epoch:
            self._groups, self._epoch = {}, epoch
        return self._planned

    def _batch(self, rows: IndexedRows, planned: PlannedBatch) -> RolloutBatch:
        if planned.window:
            self._begin_step(rows, planned)
        batch: RolloutBatch = super()._batch(rows, planned)
        return replace(batch, step=self._step)

    def _begin_step(self, rows: IndexedRows, planned: PlannedBatch) -> None:
        """Have a rollout made, unless an earlier one has the responses of this step on all ranks."""
        if self.source is None:
            raise ConfigError("data: nothing samples responses. Train with a module that does, as PolicyModule.")
        to_come = range(self._at, len(self._planned))  # an epoch may be long: no step looks at all of it
        self._at = next(position for position in to_come if self._planned[position] is planned)
        begins = (self._planned[position] for position in range(self._at, len(self._planned)))
        steps = list(islice((each for each in begins if each.window), self.steps_per_rollout))
        self._first_batch = self._begun(self._epoch).batches + self._at
        self._steps = own = [[index for group in step.own_window for index in group] for step in steps]
        if _on_any_rank(any(index not in self._groups for index in own[0])):
            coming = [index for step in own for index in step]
            self._groups = {group.index: group for group in self.groups_of(coming, rows, steps)}
        self._step = self.source.weigh([self._groups[index] for index in own[0]])

    def groups_of(self, indices: list[int], rows: IndexedRows, steps: Sequence[PlannedBatch]) -> list[Group]:
        """What coming optimizer steps train on: responses of the source.

        Args:
            indices: This rank's prompts.
            rows: All of them.
            steps: The first micro-batch of each step, which knows the prompts of all ranks.
        """
        source = present(self.source, "what samples responses")
        return source.roll_out(rows.rows(indices) if indices else [], indices)

    def collate(self, rows: list[dict[str, Any]], planned: PlannedBatch) -> RolloutBatch:
        """The responses to the prompts, in one packed row or padded."""
        if planned.dummy:  # it takes part in every collective and adds nothing to the loss
            nothing = Answer(token_ids=rows[0]["input_ids"][-1:], text="", truncated=False, weights=[0.0])
            groups = [Group(index=-1, prompt=rows[0]["input_ids"], answers=[nothing])]
        else:
            groups = [self._groups[index] for index in planned.indices]
        names = [f"{row['dataset']}/{row['id']}" for row in rows]
        return self.batch(groups, names)

    def batch(self, groups: Sequence[Group], ids: list[str]) -> RolloutBatch:
        """The responses of groups, in one packed row or padded.

        Args:
            groups: The groups.
            ids: Of their records.
        """
        pad = None if self.packing else int(self.tokenizer.pad_token_id)
        batch = collate_responses([_examples(group) for group in groups], pad, self.share_prompts)
        answers = [answer for group in groups for answer in group.answers]
        return RolloutBatch(
            **vars(batch) | {"ids": ids},
            counts=torch.tensor(batch.lengths),
            old_logps=_joined([answer.old_logps for answer in answers]),
            sampler_logps=_joined([answer.sampler_logps for answer in answers]),
            advantages=torch.tensor([answer.advantage for answer in answers]),
            truncated=torch.tensor([answer.truncated for answer in answers]),
            scored=torch.tensor([not math.isnan(answer.reward) for answer in answers]),
            step=None,
        )

    # What a checkpoint holds.

    def state_dict(self) -> dict[str, Any]:
        """Also the rollout, whose later steps are still to come."""
        state = super().state_dict()
        if not state:
            return state
        groups = [asdict(group) for group in self._to_come()]
        if dist.is_available() and dist.is_initialized():
            of_ranks: list[list[dict[str, Any]]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(of_ranks, groups)
            groups = [group for own in of_ranks for group in own]
        return state | {"rollout": {"epoch": self._epoch, "groups": groups}}

    def _to_come(self) -> list[Group]:
        """This rank's responses of the rollout on which no optimizer step has trained."""
        at = standing(present(self.trainer, "the Trainer"))
        if at.epoch != self._epoch:
            return []
        steps = self._steps[1:] if at.batches > self._first_batch else self._steps
        return [self._groups[index] for step in steps for index in step if index in self._groups]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also take up the rollout."""
        super().load_state_dict(state_dict)
        stored = state_dict.get("rollout", {"epoch": -1, "groups": []})
        self._epoch = stored["epoch"]
        self._groups = {group.index: group for group in map(Group.of, stored["groups"])}
        self._steps, self._first_batch = [list(self._groups)], math.inf

    def views(self, row: dict[str, Any]) -> list[tuple[str, Example]]:
        """The prompt."""
        ids = row["input_ids"]
        return [("prompt", Example(ids, [IGNORE_INDEX] * len(ids), [0.0] * len(ids)))]


def _on_any_rank(found: bool) -> bool:
    """Whether something holds on some rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return found
    ranks: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(ranks, found)
    return any(ranks)


def _examples(group: Group) -> list[Example]:
    """The prompt with each of its responses."""
    start, examples = len(group.prompt), []
    for answer in group.answers:
        weights = [1.0] * len(answer.token_ids) if answer.weights is None else answer.weights
        labels = [token if w else IGNORE_INDEX for token, w in zip(answer.token_ids, weights, strict=True)]
        ids = group.prompt + answer.token_ids
        examples.append(Example(ids, [IGNORE_INDEX] * start + labels, [0.0] * start + weights))
    return examples


def _joined(parts: Iterable[list[float] | None]) -> torch.Tensor | None:
    """One value for each target, [N]; None where there are none."""
    known = [part for part in parts if part is not None]
    return torch.tensor([value for part in known for value in part]) if known else None

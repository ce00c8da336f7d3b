"""What models say about answers: log-probabilities, and the use of documents.

N answer tokens, V vocabulary
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from lit_alignment.data.batching.collate import collate_padded
from lit_alignment.data.encoding.encoder import Encoder
from lit_alignment.data.encoding.example import Dropped, Example
from lit_alignment.data.encoding.messages import TEMPLATE_KEYS, Message, Record, value_kind
from lit_alignment.data.passages import format_passage, read_passage
from lit_alignment.errors import ConfigError, RecordError
from lit_alignment.evaluation.answers import Answered
from lit_alignment.models.logprobs import target_logps

NO_LIMIT = 1 << 30


@dataclass
class AnsweredPrompt:
    """A prompt, its answers, and what a predictions line says of them.

    Args:
        messages: The conversation up to the answer.
        answers: Texts.
        finished: Whether each answer ended by itself, so that its end-of-turn token is one of its tokens.
        reference: What was wanted.
        num_tokens: Tokens of each answer, if known.
        documents: Retrieved texts.
    """

    messages: list[Message]
    answers: list[str]
    finished: list[bool]
    reference: str | None = None
    num_tokens: list[int] | None = None
    documents: Sequence[str] = ()


class Scorer:
    """Adds to answers what the asked metrics need of models.

    Args:
        metrics: Names of metrics.
        encoder: How conversations become ids, as in training.
        network: The model; needed by perplexity, kl and retrieval_utility.
        base: The model before training; None uses `network` with its adapters switched off.
        reward: Gives the raw score of each conversation.
    """

    def __init__(
        self,
        metrics: Sequence[str],
        encoder: Encoder | None = None,
        network: nn.Module | None = None,
        base: nn.Module | None = None,
        reward: Callable[[Sequence[list[Message]]], list[float]] | None = None,
    ) -> None:
        """Check that each metric has what it needs."""
        self.metrics, self.network, self.base = set(metrics), network, base
        if self.metrics & {"perplexity", "kl", "retrieval_utility"} and (network is None or encoder is None):
            raise ConfigError("perplexity, kl and retrieval_utility need a model: give --model.")
        if "kl" in self.metrics and base is None and not isinstance(network, PeftModel):
            raise ConfigError("kl needs the base model: give --base, or a model with adapters.")
        if "reward" in self.metrics and reward is None:
            raise ConfigError("reward needs a reward model: give --reward, or CherryPicks' reward_model.")
        if encoder is not None:
            # A prompt's messages are what was asked: its system message is the one that stood there then.
            config = replace(
                encoder.config,
                loss_on="last_assistant",
                max_length=NO_LIMIT,
                random_cut=False,
                end_of_turn="turn",
                ignore_system_prompt=False,
            )
            self.encoders = {
                True: Encoder(encoder.tokenizer, config),
                False: Encoder(encoder.tokenizer, replace(config, end_of_turn="none")),
            }
        self.reward = reward if "reward" in self.metrics else None

    def score(self, prompts: Sequence[AnsweredPrompt]) -> list[Answered]:
        """What the metrics need, for each prompt; all answers go through a model together, in batches."""
        found = [Answered(prompt.answers, prompt.reference, prompt.num_tokens) for prompt in prompts]
        if self.network is not None and self.metrics & {"perplexity", "kl"}:
            for item, ours in zip(found, self._logps(self.network, prompts), strict=True):
                item.logps = ours
        if self.network is not None and "kl" in self.metrics:
            with _without_adapters(self.network) if self.base is None else nullcontext():
                for item, theirs in zip(found, self._logps(self.base or self.network, prompts), strict=True):
                    item.base_logps = theirs
        for item, prompt in zip(found, prompts, strict=True):
            if self.reward is not None:
                conversations = [[*prompt.messages, {"role": "assistant", "content": text}] for text in prompt.answers]
                item.rewards = self.reward(conversations)
            if "retrieval_utility" in self.metrics and prompt.documents:
                item.document_utilities = self._utilities(prompt)
        return found

    def _logps(self, network: nn.Module, prompts: Sequence[AnsweredPrompt]) -> list[list[list[float]]]:
        """Log-probability of each token of each answer of each prompt; none for an answer without tokens."""
        encoded = [
            self._encoded(prompt.messages, text, done)
            for prompt in prompts
            for text, done in zip(prompt.answers, prompt.finished, strict=True)
        ]
        flat = iter(answer_logps(network, encoded))
        return [[next(flat) for _ in prompt.answers] for prompt in prompts]

    def _encoded(self, messages: list[Message], text: str, finished: bool) -> tuple[list[int], list[int]]:
        # What earlier messages say of the loss is about training; here the answer alone counts.
        asked: list[Message] = [{k: m[k] for k in TEMPLATE_KEYS if k in m} | {"train": False} for m in messages]
        answer = {"role": "assistant", "content": text, "train": True}
        try:
            example = self.encoders[finished].encode(Record("", [*asked, answer], "answer"))
        except Dropped:
            return [], []
        return example.input_ids, example.labels

    def _utilities(self, prompt: AnsweredPrompt) -> list[list[float]]:
        """For each answer: CE without documents minus CE with each of them, and with all, in nats a token."""
        questions = [i for i, message in enumerate(prompt.messages) if message["role"] == "user"]
        if not questions or self.network is None:
            return []
        contexts = ["", *prompt.documents, "\n\n".join(prompt.documents)]
        asked = []
        for context in contexts:
            messages = list(prompt.messages)
            question = messages[questions[-1]]
            if context:
                messages[questions[-1]] = {**question, "content": f"{context}\n\n{question['content']}"}
            asked.append(replace(prompt, messages=messages))
        by_answer = zip(*self._logps(self.network, asked), strict=True)  # each in all contexts
        rows = [[-sum(logps) / len(logps) for logps in contexts] for contexts in by_answer if all(contexts)]
        return [[plain - entropy for entropy in others] for plain, *others in rows]


def read_documents(value: Any, where: str) -> list[str]:
    """The texts of a prompt's documents, with their titles above; none if the field is missing.

    Args:
        value: What the record has in `documents`: texts, or `{title?, text}` as `predict` writes them.
        where: The record's place, for the message.

    Raises:
        RecordError: If it is no list of passages.
    """
    if value is None:
        return []
    if not isinstance(value, list):
        raise RecordError(where, "documents", f"is {value_kind(value)}", 'Write ["first document", "second document"].')
    passages = [read_passage(each, f"{where}: documents", place) for place, each in enumerate(value)]
    return [format_passage("{title}\n{text}", passage.title, passage.text) for passage in passages]


@torch.no_grad()
def answer_logps(
    network: nn.Module, encoded: Sequence[tuple[list[int], list[int]]], batch_size: int = 8
) -> list[list[float]]:
    """Log-probabilities of labelled tokens, one list a sequence; rows are padded on the right, which changes nothing.

    Args:
        network: A causal language model.
        encoded: Token ids and labels of each sequence; labels are IGNORE_INDEX where nothing is asked.
        batch_size: Sequences in a forward pass.
    """
    training = network.training
    network.eval()
    order = sorted((i for i, (ids, _) in enumerate(encoded) if ids), key=lambda i: -len(encoded[i][0]))
    found: list[list[float]] = [[] for _ in encoded]
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        batch = collate_padded([Example(*encoded[i], weights=[1.0] * len(encoded[i][0])) for i in part], pad_token_id=0)
        for i, logps in zip(part, torch.split(target_logps(network, batch), batch.lengths), strict=True):
            found[i] = logps.tolist()
    network.train(training)
    return found


def _without_adapters(network: nn.Module) -> AbstractContextManager[Any]:
    if not isinstance(network, PeftModel):
        raise ConfigError("kl needs the base model: give --base, or a model with adapters.")
    switched_off: AbstractContextManager[Any] = network.disable_adapter()
    return switched_off

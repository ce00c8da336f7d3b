"""Whether two forms of one model answer alike: logits or scores of a few prompts, compared.

T tokens, V vocabulary, K scores
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from lit_alignment.data.encoding.encoder import Encoder, EncodingConfig
from lit_alignment.data.encoding.example import Dropped
from lit_alignment.data.encoding.messages import read_record
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError
from lit_alignment.models.head import scores_at

TEXTS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "def fibonacci(n):",
    "Explain to a child why the sky is blue, in two sentences.",
)
NUM_PROMPTS = 16


def encode_prompts(tokenizer: PreTrainedTokenizerBase, file: Path | None) -> list[list[int]]:
    """Token ids of the prompts to compare on: records of a file, or a few questions."""
    if tokenizer.chat_template is None:
        if file is not None:
            raise ConfigError(f"{tokenizer.name_or_path} has no chat template to render {file} with.")
        return [tokenizer(text)["input_ids"] for text in TEXTS]
    questions = [(f"[{i}]", {"messages": [{"role": "user", "content": text}]}) for i, text in enumerate(TEXTS)]
    records = SourceConfig(str(file)).read() if file is not None else iter(questions)
    encoder = Encoder(tokenizer, EncodingConfig())
    prompts: list[list[int]] = []
    for position, (where, raw) in enumerate(records):
        try:
            prompts.append(encoder.encode_prompt(read_record(raw, where, position)).input_ids)
        except Dropped as drop:
            print(f"{where}: not compared ({drop.reason})")
        if len(prompts) == NUM_PROMPTS:
            break
    if not prompts:
        raise ConfigError(f"{file}: no record to compare on.")
    return prompts


@torch.no_grad()
def logits(network: nn.Module, prompts: list[list[int]]) -> list[Tensor]:
    """Logits after each prompt's tokens, [T, V] each, or transformers' own scores of it, [1, K]."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=_device(network))
        output = network(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        # A classifier has one row of scores a sequence, a language model one a token; prompt learning adds some before.
        found.append((output if output.ndim == 2 else output[0, -len(prompt) :]).float().cpu())
    return found


@torch.no_grad()
def scores(network: nn.Module, prompt: list[int]) -> Tensor:
    """A classifier's scores of a prompt's last token, [1, K], as they were in training: by position, not by padding."""
    ids = torch.tensor([prompt], device=_device(network))
    last = torch.tensor([len(prompt) - 1], device=ids.device)
    return scores_at(network, last, input_ids=ids, attention_mask=torch.ones_like(ids)).float().cpu()


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars for the reading and writing of weights."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Without dropout, for a while."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class Difference:
    """How far two models' logits are apart.

    Args:
        largest: Largest absolute difference of a logit.
        scale: Largest absolute logit.
        agreement: Share of positions with the same most likely token.
    """

    largest: float
    scale: float
    agreement: float

    @property
    def share(self) -> float:
        """The largest difference as a share of the largest logit."""
        return self.largest / self.scale

    def __str__(self) -> str:
        return (
            f"largest difference {self.largest:.3g} ({self.share:.2g} of the largest logit), "
            f"same top token at {self.agreement:.1%} of positions"
        )


def compare(before: list[Tensor], after: list[Tensor]) -> Difference:
    """The difference over all prompts; padding rows of the vocabulary that only one side has are left out."""
    width = min(before[0].shape[1], after[0].shape[1])
    pairs = [(a[:, :width], b[:, :width]) for a, b in zip(before, after, strict=True)]
    agreeing = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs)
    return Difference(
        largest=max(float((a - b).abs().max()) for a, b in pairs),
        scale=max(float(a.abs().max()) for a, _ in pairs),
        agreement=agreeing / sum(len(a) for a, _ in pairs),
    )

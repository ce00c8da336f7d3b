"""The engine on transformers' own generate.

B prompts, S completions of each, T tokens
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lit_alignment.data.batching.collate import Sequences, collate_padded, pad_prompts, pad_sequences
from lit_alignment.data.encoding.example import Example
from lit_alignment.data.encoding.messages import IGNORE_INDEX
from lit_alignment.generation.engine import Completion, Engine, Request, Result, cut_completion, prompt_seed
from lit_alignment.generation.pieces import TextPieces
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.models.adapters import is_prompt_learning, prefix_cache
from lit_alignment.models.head import base_model, hidden_states, scores_at
from lit_alignment.models.logprobs import row_inputs, target_logps
from lit_alignment.models.multimodal.placing import Placement, placed
from lit_alignment.moved import renamed


class TransformersEngine(Engine):
    """Answers or scores batches of the requests, in their order.

    Args:
        network: A causal language model, or one with a head of scores; it is put into eval mode for each batch.
        tokenizer: Its tokenizer.
        batch_size: Requests to answer together; neighbours of other settings are not.
        synced: Continue each batch until all ranks are done, as sharded models need.
        sampled_logps: Give all completions their log-probabilities, at the temperature that they were sampled at.
        on_text: Gets the text of a completion piece by piece, where one prompt with one answer is asked alone; else
            that of the first one, at its end.
    """

    def __init__(
        self,
        network: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 8,
        synced: bool = False,
        sampled_logps: bool = False,
        on_text: Callable[[str], None] | None = None,
    ) -> None:
        """Keep the parts."""
        self.network, self.tokenizer, self.on_text = network, tokenizer, on_text
        self.batch_size, self.synced, self.sampled_logps = batch_size, synced, sampled_logps

    def stream(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Result]]:
        """Each request with its result, batch by batch."""
        batch: list[Request] = []
        for request in requests:
            if batch and _settings(request) != _settings(batch[0]):
                yield from self._run(batch)
                batch = []
            batch.append(request)
            if len(batch) == self.batch_size:
                yield from self._run(batch)
                batch = []
        if batch:
            yield from self._run(batch)

    @torch.no_grad()
    def _run(self, batch: list[Request]) -> list[tuple[Request, Result]]:
        training = self.network.training
        self.network.eval()
        results: Sequence[Result]
        try:
            with placed(self.network, _placements(batch)):
                results = self._scores(batch) if batch[0].decoding is None else self._completions(batch)
        finally:
            self.network.train(training)
        return list(zip(batch, results, strict=True))

    def _scores(self, batch: list[Request]) -> list[Tensor]:
        """Raw scores at the last token of each prompt, [K] each."""
        items = [Sequences(list(request.token_ids), [[]]) for request in batch]
        rows, ends = pad_sequences(items, int(self.tokenizer.pad_token_id or 0))
        inputs = row_inputs(self.network, rows)
        read_at = torch.tensor(ends, device=inputs["input_ids"].device) - 1
        return list(scores_at(self.network, read_at, **inputs))

    def _completions(self, batch: list[Request]) -> list[list[Completion]]:
        first, prompts = batch[0], [list(request.token_ids) for request in batch]
        decoding = first.decoding or DecodingConfig()
        device = next(self.network.parameters()).device
        input_ids, attention_mask = (t.to(device) for t in pad_prompts(prompts, self._padding))
        arguments: dict[str, Any] = {"tokenizer": self.tokenizer} if first.stop_strings else {}
        config = _generation_config(self.network, first, decoding, self._padding)
        arguments |= {"generation_config": config, "synced_gpus": self.synced}
        pieces = None if self.on_text is None else TextPieces(self.tokenizer, first, self.on_text)
        if pieces is not None and len(batch) == config.num_beams == config.num_return_sequences == 1:
            arguments["streamer"] = pieces
        with seeded(first.seed, prompts, device), _nothing_else(self.network):
            sequences = _sequences(self.network, input_ids, attention_mask, arguments)
        copies = decoding.num_return_sequences
        owners = [request for request in batch for _ in range(copies)]
        completions = [
            cut_completion(row, request, self.tokenizer)
            for row, request in zip(sequences[:, input_ids.shape[1] :].tolist(), owners, strict=True)
        ]
        if pieces is not None:
            pieces.finish(completions[0].text)
        if self.sampled_logps or decoding.logprobs:
            temperature = decoding.temperature if self.sampled_logps else 0.0
            completions = self._with_logps(completions, owners, temperature or 1.0)
        return [completions[start : start + copies] for start in range(0, len(completions), copies)]

    @property
    def _padding(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)

    def _with_logps(self, completions: list[Completion], owners: list[Request], temperature: float) -> list[Completion]:
        """Completions with the log-probability of each token, from one forward pass over prompts and completions."""
        examples = []
        for completion, request in zip(completions, owners, strict=True):
            prompt, tokens = list(request.token_ids), completion.token_ids
            weights = [0.0] * len(prompt) + [1.0] * len(tokens)
            examples.append(Example(prompt + tokens, [IGNORE_INDEX] * len(prompt) + tokens, weights))
        rows = collate_padded(examples, self._padding)
        logps = torch.split(target_logps(self.network, rows, temperature=temperature), rows.lengths)
        return [
            replace(completion, logps=values.tolist()) for completion, values in zip(completions, logps, strict=True)
        ]


def _settings(request: Request) -> tuple[Any, ...]:
    """What requests that are answered together have in common."""
    return request.decoding, request.stop, list(request.never), request.seed


def _placements(batch: list[Request]) -> list[Placement]:
    """The embeddings at the placeholders of a batch."""
    if any(request.images is not None for request in batch):
        raise TypeError("the transformers engine takes embeddings of images, not their files.")
    placeholders = sorted({token_id for request in batch for token_id in request.embeddings})
    placements = []
    for token_id in placeholders:
        parts = [request.embeddings[token_id] for request in batch if token_id in request.embeddings]
        counts = [len(request.embeddings.get(token_id, ())) for request in batch]
        placements.append(Placement(token_id, torch.cat(parts), counts))
    return placements


@contextmanager
def seeded(seed: int, prompts: Sequence[Sequence[int]], device: torch.device) -> Iterator[None]:
    """Draw under a seed that depends on the prompts, not on what was drawn before: a resumed run draws the same."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(prompt_seed(seed, prompts))
        yield


@contextmanager
def _nothing_else(network: nn.Module) -> Iterator[None]:
    """Have answers decided by what is asked alone: generate fills up what is not with the base's own settings."""
    model = base_model(network)
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _sequences(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Prompts and completions, [B * S, T].

    The virtual tokens of prompt learning are given as a cache that is filled already: peft's own generate counts their
    positions differently from its training.
    """
    plain = cast(GenerationMixin, model)
    if not isinstance(model, PeftModel) or not is_prompt_learning(model):
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        config = arguments["generation_config"]
        # Where all ranks have to make the same passes, none makes one more.
        if config.num_return_sequences > 1 and config.num_beams == 1 and not arguments["synced_gpus"]:
            inputs |= _read_once(model, input_ids, attention_mask, config)
        return cast(Tensor, plain.generate(**inputs, **arguments))
    number = model.active_peft_config.num_virtual_tokens
    config = arguments["generation_config"]
    copies = max(config.num_beams, config.num_return_sequences)  # transformers expands tensors, but no cache
    # The cache's positions need ids; a prompt's own last token changes nothing for the repetition penalty.
    filled = input_ids[:, -1:].expand(-1, number)
    sequences: Tensor = base_model(model).generate(
        input_ids=torch.cat([filled, input_ids], 1),
        attention_mask=torch.cat([attention_mask.new_ones(len(attention_mask), number), attention_mask], dim=1),
        past_key_values=prefix_cache(model, len(input_ids) * copies),
        **arguments,
    )
    return sequences[:, number:]


def _read_once(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, config: GenerationConfig
) -> dict[str, Tensor | Cache]:
    """What generate continues when each prompt is read once, not once for each of its answers; nothing if it cannot.

    Args:
        model: A causal language model, with or without adapters.
        input_ids: Prompts, [B, T].
        attention_mask: 0 on the padding before them, [B, T].
        config: Of generation; its number of answers becomes 1 where the prompts are repeated here.
    """
    number, length = config.num_return_sequences, input_ids.shape[1] - 1
    cache = DynamicCache(config=base_model(model).config)
    # The states of recurrent layers are not kept by position.
    if length == 0 or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return {}
    before = attention_mask[:, :length]  # all but the last token, whose logits generate needs
    positions = (before.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": input_ids[:, :length], "attention_mask": before, "position_ids": positions}
    hidden_states(model, **inputs, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(number)
    config.num_return_sequences = 1
    repeated = (each.repeat_interleave(number, 0) for each in (input_ids, attention_mask))
    return dict(zip(("input_ids", "attention_mask"), repeated, strict=True)) | {"past_key_values": cache}


def _generation_config(
    model: nn.Module, request: Request, decoding: DecodingConfig, pad_token_id: int
) -> GenerationConfig:
    sampling: dict[str, Any] = {"do_sample": False}
    if decoding.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "top_k": decoding.top_k,
        }
    text = base_model(model).config.get_text_config()
    # Rows that a stop string has ended are padded only if some token ends them too: one that is never generated.
    ends = request.stop.token_ids or [text.vocab_size]
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        num_beams=decoding.num_beams,
        num_return_sequences=decoding.num_return_sequences,
        repetition_penalty=decoding.repetition_penalty,
        eos_token_id=ends,
        bos_token_id=text.bos_token_id,
        pad_token_id=pad_token_id,
        stop_strings=request.stop_strings or None,
        suppress_tokens=list(request.never) or None,
        **sampling,
    )


def __getattr__(name: str) -> Any:
    return renamed(__name__, name)

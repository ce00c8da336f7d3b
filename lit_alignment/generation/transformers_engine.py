"""Answers from transformers' own generate.

B prompts, S answers to each, T tokens, V vocabulary
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedTokenizerBase

from lit_alignment.data.batching.collate import pad_prompts
from lit_alignment.generation.settings import Answer, DecodingConfig
from lit_alignment.models.adapters import is_prompt_learning, prefix_cache
from lit_alignment.models.head import base_model
from lit_alignment.models.stop_rule import StopRule


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: DecodingConfig,
    stop: StopRule,
    synced: bool = False,
    never: Sequence[int] = (),
) -> list[list[Answer]]:
    """Answers to each prompt, in the order of the prompts.

    Args:
        model: A causal language model; it is put into eval mode for the call.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt, of any lengths; they are padded on the left.
        settings: How to generate.
        stop: What ends a turn.
        synced: Go on until all ranks are done, as sharded models need.
        never: Tokens that are never generated.

    Returns:
        `num_return_sequences` answers to each prompt.
    """
    device = next(model.parameters()).device
    input_ids, attention_mask = (t.to(device) for t in pad_prompts(prompts, int(tokenizer.pad_token_id or 0)))
    strings = [*settings.stop_strings, *stop.strings]
    arguments: dict[str, Any] = {"tokenizer": tokenizer} if strings else {}
    training = model.training
    model.eval()
    with seeded(settings.seed, prompts, device):
        sequences = _sequences(
            model,
            input_ids,
            attention_mask,
            generation_config=_generation_config(
                model, settings, stop, strings, int(tokenizer.pad_token_id or 0), never
            ),
            synced_gpus=synced,
            **arguments,
        )
    width = input_ids.shape[1]
    logprobs = _logprobs(model, sequences, attention_mask, width, settings, stop) if settings.logprobs else None
    model.train(training)

    answers: list[list[Answer]] = []
    for row, sequence in enumerate(sequences[:, width:].tolist()):
        prompt, number = divmod(row, settings.num_return_sequences)
        if number == 0:
            answers.append([])
        answer = cut_answer(str(number), sequence, list(prompts[prompt]), tokenizer, settings, stop, strings)
        answer.logprob = None if logprobs is None else logprobs[row]
        answers[prompt].append(answer)
    return answers


def prompt_seed(seed: int, prompts: Sequence[Sequence[int]]) -> int:
    """A seed of the prompts, so that a resumed run draws the same."""
    digest = hashlib.sha256(f"{seed}/{list(map(list, prompts))}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@contextmanager
def seeded(seed: int, prompts: Sequence[Sequence[int]], device: torch.device) -> Iterator[None]:
    """Draw under a seed that depends on the prompts, not on what was drawn before: a resumed run draws the same."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(prompt_seed(seed, prompts))
        yield


def _sequences(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, **arguments: Any) -> Tensor:
    """Prompts and answers, [B * S, T].

    Vectors that prompt learning puts before the tokens are given as a cache that is filled already: peft's own
    generate counts their positions differently from its training.
    """
    plain = cast(GenerationMixin, model)
    if not isinstance(model, PeftModel) or not is_prompt_learning(model):
        return cast(Tensor, plain.generate(input_ids=input_ids, attention_mask=attention_mask, **arguments))
    number = model.active_peft_config.num_virtual_tokens
    config = arguments["generation_config"]
    copies = max(config.num_beams, config.num_return_sequences)  # transformers expands tensors, but no cache
    # The cache's positions need ids; a prompt's own last token changes nothing for the repetition penalty.
    filled = input_ids[:, -1:].expand(-1, number)
    sequences: Tensor = base_model(model).generate(
        input_ids=torch.cat([filled, input_ids], 1),
        attention_mask=_after_prefix(attention_mask, number),
        past_key_values=prefix_cache(model, len(input_ids) * copies),
        **arguments,
    )
    return sequences[:, number:]


def _after_prefix(attention_mask: Tensor, number: int) -> Tensor:
    return torch.cat([attention_mask.new_ones(len(attention_mask), number), attention_mask], dim=1)


def _generation_config(
    model: nn.Module,
    settings: DecodingConfig,
    stop: StopRule,
    strings: list[str],
    pad_token_id: int,
    never: Sequence[int],
) -> GenerationConfig:
    sampling: dict[str, Any] = {"do_sample": False}
    if settings.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
        }
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.num_beams,
        num_return_sequences=settings.num_return_sequences,
        repetition_penalty=settings.repetition_penalty,
        eos_token_id=stop.token_ids or None,
        bos_token_id=base_model(model).config.get_text_config().bos_token_id,
        pad_token_id=pad_token_id,
        stop_strings=strings or None,
        suppress_tokens=list(never) or None,
        **sampling,
    )


def cut_answer(
    number: str,
    sequence: list[int],
    prompt: list[int],
    tokenizer: PreTrainedTokenizerBase,
    settings: DecodingConfig,
    stop: StopRule,
    strings: list[str],
) -> Answer:
    """Cut a generated row where its turn ends, and turn it into text."""
    length = answer_length(sequence, stop)
    finished = length > 0 and sequence[length - 1] in stop.token_ids
    kept = sequence[:length]
    body = kept[:-1] if finished and settings.skip_special_tokens else kept
    text = tokenizer.decode(body, skip_special_tokens=settings.skip_special_tokens)
    cuts = [text.find(string) for string in strings if string in text]
    if cuts:
        # Rows that stopped early are padded until the last one stops; their text ends before the stop string.
        text, finished = text[: min(cuts)], True
        padding = tokenizer.pad_token_id
        while length > 1 and sequence[length - 1] == padding:
            length -= 1
    if not settings.remove_prompt:
        text = tokenizer.decode(prompt, skip_special_tokens=settings.skip_special_tokens) + text
    return Answer(number, text, "stop" if finished else "length", length)


def answer_length(sequence: Sequence[int], stop: StopRule) -> int:
    """Tokens up to and with the first that ends the turn."""
    for position, token in enumerate(sequence):
        if token in stop.token_ids:
            return position + 1
    return len(sequence)


def _logprobs(
    model: nn.Module,
    sequences: Tensor,
    prompt_mask: Tensor,
    width: int,
    settings: DecodingConfig,
    stop: StopRule,
) -> list[float]:
    """Summed log-probability of each answer, [B * S], from one forward pass over prompts and answers."""
    lengths = torch.tensor([answer_length(s, stop) for s in sequences[:, width:].tolist()], device=sequences.device)
    answer_mask = torch.arange(sequences.shape[1] - width, device=sequences.device)[None] < lengths[:, None]
    mask = torch.cat([prompt_mask.repeat_interleave(settings.num_return_sequences, 0).bool(), answer_mask], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    num_new = sequences.shape[1] - width
    inputs: dict[str, Any] = {"attention_mask": mask.long(), "position_ids": positions, "use_cache": False}
    if isinstance(model, PeftModel) and is_prompt_learning(model):
        number = model.active_peft_config.num_virtual_tokens
        inputs = {"attention_mask": _after_prefix(mask.long(), number), "position_ids": positions + number}
        inputs["past_key_values"] = prefix_cache(model, len(sequences))
        model = base_model(model)
    logits = model(input_ids=sequences, **inputs, logits_to_keep=num_new + 1).logits[:, :-1]
    logps = logits.float().log_softmax(-1).gather(2, sequences[:, width:, None]).squeeze(2)  # [B * S, num_new]
    return [float(total) for total in (logps * answer_mask).sum(1)]

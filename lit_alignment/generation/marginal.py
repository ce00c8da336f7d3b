"""What a generator makes of an answer after different passages, and answers that sum over the passages.

B questions, C contexts, K passages of a question, T answer tokens, V vocabulary
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lit_alignment.data.batching.collate import Sequences, pack_sequences, pad_prompts, pad_sequences
from lit_alignment.data.encoding.encoder import Example
from lit_alignment.data.encoding.messages import IGNORE_INDEX
from lit_alignment.errors import ConfigError
from lit_alignment.generation.settings import Answer, DecodingConfig
from lit_alignment.generation.transformers_engine import cut_answer, seeded
from lit_alignment.models.attention import document_arguments
from lit_alignment.models.head import base_model, hidden_states, token_logps
from lit_alignment.models.stop_rule import StopRule


def answer_token_logps(
    network: nn.Module, examples: Sequence[Sequence[Example]], pad_token_id: int, packing: bool
) -> tuple[Tensor, Tensor]:
    """Log-probability of each answer token after each context, [B, C, T], and the tokens' weights, [B, T].

    Args:
        network: A causal language model.
        examples: For each question the same answer after C contexts.
        pad_token_id: For padding.
        packing: Put all sequences into one row without padding, those of a question going on from a common beginning.
    """
    sequences = [common_start(own) for own in examples]
    rows, begins = pack_sequences(sequences, share=True) if packing else pad_sequences(sequences, pad_token_id)
    places, targets, counts = [], [], []
    starts = iter(begins)
    for own, shared in zip(examples, sequences, strict=True):
        for example in own:
            begin = next(starts) - len(shared.prompt)
            trained = trained_places(example)
            places += [begin + t - 1 for t in trained]  # position t is predicted from t - 1
            targets += [example.labels[t] for t in trained]
            counts.append(len(trained))
    device = next(network.parameters()).device
    implementation = base_model(network).config._attn_implementation
    hidden = hidden_states(
        network,
        input_ids=rows.input_ids.to(device),
        attention_mask=None if rows.attention_mask is None else rows.attention_mask.to(device),
        position_ids=rows.position_ids.to(device),
        **document_arguments(implementation, rows.document_lengths, device, rows.document_parents),
    ).flatten(0, 1)
    flat = token_logps(network, hidden[places], torch.tensor(targets, device=device))
    padded = pad_sequence(list(torch.split(flat, counts)), batch_first=True)  # [B * C, T]
    weights = [torch.tensor([own[0].weights[t] for t in trained_places(own[0])]) for own in examples]
    return (
        padded.view(len(examples), -1, padded.shape[1]),
        pad_sequence(weights, batch_first=True).to(device),
    )


def trained_places(example: Example) -> list[int]:
    """Places of the labels that count."""
    return [t for t, label in enumerate(example.labels) if label != IGNORE_INDEX and t > 0]


def common_start(examples: Sequence[Example]) -> Sequences:
    """The ids of a question's sequences, with what all begin with apart, so that it is computed once."""
    ids = [example.input_ids for example in examples]
    # The state before the first answer token must be the sequence's own.
    limit = min(trained_places(example)[0] for example in examples) - 1
    shared = 0
    if len(ids) > 1:
        while shared < limit and len({own[shared] for own in ids}) == 1:
            shared += 1
    return Sequences(ids[0][:shared], [own[shared:] for own in ids])


@torch.no_grad()
def generate_by_token(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Sequence[int]]],
    log_priors: Tensor,
    settings: DecodingConfig,
    stop: StopRule,
) -> list[list[Answer]]:
    """Answers whose every token is drawn from the mixture over the passages.

    p(y_t | x, y_<t) = sum_k p(z_k) p(y_t | x, z_k, y_<t)

    Args:
        model: A causal language model; it is put into eval mode for the call.
        tokenizer: Its tokenizer.
        prompts: For each question a prompt with each of its K passages.
        log_priors: log p(z_k), [B, K].
        settings: How to generate, greedily or by sampling.
        stop: What ends a turn.

    Raises:
        ConfigError: If beams or a repetition penalty are asked for.

    Source: RAG-Token decoding of Lewis et al. 2020 (arXiv:2005.11401), section 2.5.
    """
    if settings.num_beams > 1 or settings.repetition_penalty != 1.0:
        raise ConfigError("generation: rag_token decoding knows neither num_beams nor repetition_penalty.")
    copies, number = settings.num_return_sequences, log_priors.shape[1]
    flat = [prompt for own in prompts for _ in range(copies) for prompt in own]
    device = next(model.parameters()).device
    input_ids, mask = (t.to(device) for t in pad_prompts(flat, int(tokenizer.pad_token_id or 0)))
    priors = log_priors.to(device).repeat_interleave(copies, 0)[..., None]  # [B, K, 1]
    strings = [*settings.stop_strings, *stop.strings]
    found: list[list[int]] = [[] for _ in range(len(prompts) * copies)]
    logps = torch.zeros(len(found), device=device)
    done = [False] * len(found)
    warp = _warpers(settings)
    training, cache = model.training, None
    model.eval()
    with seeded(settings.seed, flat, device):
        for _ in range(settings.max_new_tokens):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
            inputs: dict[str, Any] = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
            output = model(input_ids=input_ids, **inputs, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            each = output.logits[:, -1].float().log_softmax(-1).view(len(found), number, -1)
            mixed = (priors + each).logsumexp(1)  # [B, V]
            if settings.temperature > 0:
                chosen = torch.multinomial(warp(None, mixed).softmax(-1), 1)
            else:
                chosen = mixed.argmax(-1, keepdim=True)
            gained = mixed.gather(1, chosen)[:, 0]
            for row, token in enumerate(chosen[:, 0].tolist()):
                if not done[row]:
                    found[row].append(token)
                    logps[row] += gained[row]
                    text = tokenizer.decode(found[row]) if strings else ""
                    done[row] = token in stop.token_ids or any(string in text for string in strings)
            if all(done):
                break
            input_ids = chosen.repeat_interleave(number, 0)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    model.train(training)
    answers = []
    for row, tokens in enumerate(found):
        question, copy = divmod(row, copies)
        answer = cut_answer(str(copy), tokens, list(prompts[question][0]), tokenizer, settings, stop, strings)
        answer.logprob = float(logps[row]) if settings.logprobs else None
        answers.append(answer)
    return [answers[first : first + copies] for first in range(0, len(answers), copies)]


def _warpers(settings: DecodingConfig) -> LogitsProcessorList:
    """What sampling does to the log-probabilities."""
    chain = LogitsProcessorList()
    if settings.temperature > 0:
        chain.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k > 0:
            chain.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            chain.append(TopPLogitsWarper(settings.top_p))
    return chain

"""What a generator makes of an answer after different passages, and answers that sum over the passages.

B questions, C contexts, K passages of a question, T answer tokens, V vocabulary
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
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

from lit_alignment.data.batching.collate import collate_responses, pad_prompts
from lit_alignment.data.encoding.example import Example
from lit_alignment.data.passages import Passage
from lit_alignment.errors import ConfigError
from lit_alignment.generation.engine import Completion, ItemRequests, Request, Response, cut_completion
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.generation.transformers_engine import seeded
from lit_alignment.models.logprobs import target_logps


def answer_token_logps(
    network: nn.Module, examples: Sequence[Sequence[Example]], pad_token_id: int, packing: bool
) -> tuple[Tensor, Tensor]:
    """Log-probability of each answer token after each context, [B, C, T], and the tokens' weights, [B, T].

    Args:
        network: A causal language model.
        examples: For each question the same answer after C contexts.
        pad_token_id: For padding.
        packing: Put all sequences into one row without padding, those of a question continuing from a common beginning.
    """
    batch = collate_responses(examples, None if packing else pad_token_id, share=packing)
    logps = torch.split(target_logps(network, batch), batch.lengths)
    weights = torch.split(batch.weights.to(logps[0].device, non_blocking=True), batch.lengths)
    padded = pad_sequence(list(logps), batch_first=True)  # [B * C, T]
    num_contexts = batch.groups[0]
    return (
        padded.view(len(examples), num_contexts, padded.shape[1]),
        pad_sequence(list(weights[::num_contexts]), batch_first=True),
    )


@torch.no_grad()
def generate_by_token(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Sequence[Request]],
    log_priors: Tensor,
) -> list[list[Completion]]:
    """Completions whose every token is drawn from the mixture over the passages.

    p(y_t | x, y_<t) = sum_k p(z_k) p(y_t | x, z_k, y_<t)

    Args:
        model: A causal language model; it is put into eval mode for the call.
        tokenizer: Its tokenizer.
        requests: For each question a prompt with each of its K passages; all with the same decoding, greedy or by
            sampling.
        log_priors: log p(z_k), [B, K].

    Raises:
        ConfigError: If beams or a repetition penalty are asked for.

    Source: RAG-Token decoding of Lewis et al. 2020 (arXiv:2005.11401), section 2.5.
    """
    first = requests[0][0]
    decoding = first.decoding or DecodingConfig()
    if decoding.num_beams > 1 or decoding.repetition_penalty != 1.0:
        raise ConfigError("generation: rag_token decoding knows neither num_beams nor repetition_penalty.")
    copies = decoding.num_return_sequences
    owners = [own[0] for own in requests for _ in range(copies)]
    prompts = [list(request.token_ids) for own in requests for _ in range(copies) for request in own]
    device = next(model.parameters()).device
    input_ids, mask = (each.to(device) for each in pad_prompts(prompts, int(tokenizer.pad_token_id or 0)))
    priors = log_priors.to(device).repeat_interleave(copies, 0)[..., None]  # [B, K, 1]
    training = model.training
    model.eval()
    tokens: list[list[int]] = [[] for _ in owners]
    logps: list[list[float]] = [[] for _ in owners]
    done = [False] * len(owners)
    with seeded(first.seed, prompts, device):
        for drawn, gained in _mixture(model, input_ids, mask, priors, decoding):
            for row, (token, logp) in enumerate(zip(drawn, gained, strict=True)):
                if not done[row]:
                    tokens[row].append(token)
                    logps[row].append(logp)
                    text = tokenizer.decode(tokens[row]) if first.stop_strings else ""
                    done[row] = token in first.stop.token_ids or any(each in text for each in first.stop_strings)
            if all(done):
                break
    model.train(training)
    completions = [
        cut_completion(generated, request, tokenizer, row if decoding.logprobs else None)
        for generated, request, row in zip(tokens, owners, logps, strict=True)
    ]
    return [completions[start : start + copies] for start in range(0, len(completions), copies)]


def _mixture(
    model: nn.Module, input_ids: Tensor, mask: Tensor, priors: Tensor, decoding: DecodingConfig
) -> Iterator[tuple[list[int], list[float]]]:
    """At each step the next token of each question, and its log-probability under the mixture.

    Args:
        model: A causal language model.
        input_ids: Prompts of all passages of a question, those of each question in a row, [B * K, T].
        mask: Which of these are no padding.
        priors: log p(z_k), [B, K, 1].
        decoding: How to generate.
    """
    cache, warp = None, _warpers(decoding)
    for _ in range(decoding.max_new_tokens):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        inputs: dict[str, Any] = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        output = model(input_ids=input_ids, **inputs, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        by_passage = output.logits[:, -1].float().log_softmax(-1).view(*priors.shape[:2], -1)
        mixed = (priors + by_passage).logsumexp(1)  # [B, V]
        if decoding.temperature > 0:
            drawn = torch.multinomial(warp(None, mixed).softmax(-1), 1)
        else:
            drawn = mixed.argmax(-1, keepdim=True)
        yield drawn[:, 0].tolist(), mixed.gather(1, drawn)[:, 0].tolist()
        input_ids = drawn.repeat_interleave(priors.shape[1], 0)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)


def most_likely(
    by_passage: Sequence[Sequence[Completion]],
    log_priors: Tensor,
    decoding: DecodingConfig,
    score: Callable[[list[str], bool], Tensor] | None = None,
) -> list[Completion]:
    """The candidates that were generated after each passage, by their likelihood summed over the passages.

    Args:
        by_passage: Completions after each of K passages, with log-probabilities.
        log_priors: log p(z_k), [K].
        decoding: How many to return, and whether with log-probabilities.
        score: Log-probability of each text after each passage, [texts, K], with the end of its turn or without, as of
            one that the limit cut; without it a candidate counts as impossible after passages from which it was not
            generated.

    Source: Lewis et al. 2020 (arXiv:2005.11401), section 2.5: thorough decoding with `score`, fast decoding without.
    """
    candidates = {(each.text, each.finish_reason): each for own in by_passage for each in reversed(own)}
    logps = torch.full((len(candidates), len(by_passage)), -torch.inf)
    if score is not None:
        for ended in (True, False):
            lines = [line for line, (_, reason) in enumerate(candidates) if (reason == "stop") == ended]
            if lines:
                logps[lines] = score([list(candidates)[line][0] for line in lines], ended).float().cpu()
    else:
        for column, own in enumerate(by_passage):
            generated = {(each.text, each.finish_reason): each.logp for each in reversed(own)}
            for line, candidate in enumerate(candidates):
                if (logp := generated.get(candidate)) is not None:
                    logps[line, column] = logp
    totals = (log_priors.cpu() + logps).logsumexp(-1)
    order = totals.argsort(descending=True, stable=True)[: decoding.num_return_sequences].tolist()
    kept = list(candidates.values())
    return [
        replace(kept[line], logps=None, marginal_logp=float(totals[line]) if decoding.logprobs else None)
        for line in order
    ]


def marginal_requests(
    requests: Sequence[Request],
    passages: Sequence[Passage],
    scores: Tensor,
    score: Callable[[list[str], bool], Tensor] | None,
) -> ItemRequests:
    """What an engine is asked for a question whose passages stand in a prompt each.

    All beams or draws of a prompt are candidates, and their likelihood over all passages decides.

    Args:
        requests: The prompt with each of K passages.
        passages: The passages.
        scores: Their scores, [K].
        score: As of `most_likely`.
    """
    decoding = requests[0].decoding or DecodingConfig()
    number = max(decoding.num_return_sequences, decoding.num_beams)
    alone = replace(decoding, num_return_sequences=number, logprobs=True)

    def finish(results: list[list[Completion]]) -> Response:
        completions = most_likely(results, scores.log_softmax(-1), decoding, score)
        return Response(completions, retrieved_passages(passages, scores))

    return ItemRequests([replace(each, decoding=alone) for each in requests], finish)


def retrieved_passages(passages: Sequence[Passage], scores: Tensor) -> dict[str, Any]:
    """What predictions say of a question's passages.

    Args:
        passages: K of them.
        scores: Their scores, [K].
    """
    documents = [{"id": passage.id, "title": passage.title, "text": passage.text} for passage in passages]
    return {"documents": documents, "doc_scores": scores.tolist()}


def _warpers(decoding: DecodingConfig) -> LogitsProcessorList:
    """What sampling does to the log-probabilities."""
    chain = LogitsProcessorList()
    if decoding.temperature > 0:
        chain.append(TemperatureLogitsWarper(decoding.temperature))
        if decoding.top_k > 0:
            chain.append(TopKLogitsWarper(decoding.top_k))
        if decoding.top_p < 1:
            chain.append(TopPLogitsWarper(decoding.top_p))
    return chain

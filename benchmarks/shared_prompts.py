"""What does it save to read a prompt once for both responses of a pair?

    python benchmarks/shared_prompts.py

Steps of a reward model with the width of SmolLM2-135M, 8 layers and random weights, on one packed row of pairs:
prompts of several lengths, two responses of 64 tokens each. Both ways see the same pairs in turn, so that the machine's
drift meets both; the losses are compared.
"""

import time

import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, LlamaConfig

from lit_alignment.data.batching.collate import Sequences, pack_sequences
from lit_alignment.models.attention import choose_attention, document_arguments
from lit_alignment.models.head import scores_at

RESPONSE, TOKENS, ROUNDS = 64, 2048, 5
SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 9}


def step(model: torch.nn.Module, items: list[Sequences], share: bool) -> tuple[float, float, int]:
    """Seconds of a forward and backward pass, loss, and tokens in the row."""
    rows, begins = pack_sequences(items, share)
    ends = torch.tensor([begin + RESPONSE - 1 for begin in begins])
    implementation = model.config._attn_implementation
    start = time.perf_counter()
    arguments = document_arguments(implementation, rows.document_lengths, rows.input_ids.device, rows.document_parents)
    scores = scores_at(model, ends, input_ids=rows.input_ids, position_ids=rows.position_ids, **arguments)[:, 0]
    loss = -logsigmoid(scores[::2] - scores[1::2]).mean()
    loss.backward()
    value = float(loss.detach())
    seconds = time.perf_counter() - start
    model.zero_grad()
    return seconds, value, rows.num_tokens


def main() -> None:
    """Print a table over prompt lengths."""
    torch.manual_seed(0)
    config = LlamaConfig(num_key_value_heads=3, vocab_size=4096, num_labels=1, pad_token_id=0, **SHAPE)
    implementation = choose_attention("auto", True, "cpu", config, shared_prompts=True)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=implementation)
    print("| prompt tokens | pairs | tokens, shared / apart | time, shared / apart | loss, shared - apart |")
    print("|---|---|---|---|---|")
    for prompt in (8, 32, 128, 512):
        number = max(1, TOKENS // (2 * (prompt + RESPONSE)))
        draw = [torch.randint(1, 4096, (n,)).tolist() for _ in range(number) for n in (prompt, RESPONSE, RESPONSE)]
        items = [Sequences(draw[i], [draw[i + 1], draw[i + 2]]) for i in range(0, len(draw), 3)]
        found = {True: [], False: []}
        for share in (True, False):
            step(model, items, share)
        for _ in range(ROUNDS):
            for share in (True, False):
                found[share].append(step(model, items, share))
        seconds = {share: sorted(each[0] for each in found[share])[ROUNDS // 2] for share in found}
        tokens = found[True][0][2] / found[False][0][2]
        difference = found[True][0][1] - found[False][0][1]
        print(
            f"| {prompt} | {number} | {tokens:.2f} | {seconds[True] / seconds[False]:.2f} | {difference:.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

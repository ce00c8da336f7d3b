"""From a causal language model to its last hidden states, and from those to a loss, whatever the architecture.

B rows, T tokens, N trained positions, D width, V vocabulary
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lit_alignment.errors import ConfigError
from lit_alignment.losses import (
    LinearHead,
    linear_cross_entropy,
    linear_divergence,
    linear_logps,
    linear_logps_and_entropies,
    token_cross_entropy,
    token_divergence,
    token_logps_and_entropies,
)
from lit_alignment.losses.chunks import default_chunk_size, without_autocast
from lit_alignment.models.attention import known_documents
from lit_alignment.models.router import note_router_loss


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside its adapters, if it has any."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"{type(inner).__name__} is not a transformers model.")
    return inner


def local(tensor: Any) -> Any:
    """What this process has of a tensor that it shares with others."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


SCORE = "score"  # what transformers calls the last layer of all its decoders that classify sequences


def output_head(model: nn.Module) -> nn.Module:
    """The layer that turns hidden states into logits: the output embedding, or the head of a classifier."""
    base = base_model(model)
    head = base.get_output_embeddings()
    if head is None:
        head = dict(base.named_children()).get(SCORE)
    if isinstance(head, ModulesToSaveWrapper):
        head = head.original_module if head.disable_adapters else head.modules_to_save[head.active_adapters[0]]
    if not isinstance(head, nn.Module):
        raise ConfigError(f"{type(base).__name__} has neither output embeddings nor a layer '{SCORE}' on a decoder.")
    return head


def is_product(head: nn.Module) -> bool:
    """Whether the head is one product with a weight, and no adapter makes it something else."""
    return isinstance(head, TrainableTokensWrapper) or type(head) is nn.Linear


def head_weight(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with which the head is one product."""
    if not isinstance(head, TrainableTokensWrapper):
        return local(head.weight), local(head.bias)
    adapter = head.token_adapter
    if adapter.disable_adapters:
        return head.original_module.weight, None
    return adapter.get_merged_weights(adapter.active_adapters), None


@contextmanager
def _forward(head: nn.Module, function: Callable[[Tensor], Any]) -> Iterator[None]:
    """Let calls of the head do something else.

    A strategy that gathers a layer's weights just before the layer is called does so for what happens in it.
    """
    head.forward = function
    try:
        yield
    finally:
        del head.forward


def hidden_states(model: nn.Module, **inputs: Any) -> Tensor:
    """Last hidden states as the output head gets them, [B, T, D], from an ordinary forward pass of the model.

    Positions of virtual tokens of prompt learning are left out.
    """
    captured: list[Tensor] = []

    def capture(hidden: Tensor) -> Tensor:  # the head itself would make [B, T, V]
        captured.append(local(hidden))
        return hidden[..., :1]

    with _forward(output_head(model), capture), known_documents(base_model(model).config._attn_implementation):
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            inputs.pop("position_ids", None)  # peft counts them itself, from the first virtual token on
            model(**inputs, use_cache=False)
            return captured[0][:, -inputs["input_ids"].shape[1] :]
        note_router_loss(model(**{"use_cache": False, **inputs}))
    return captured[0]


def scores_at(model: nn.Module, read_at: Tensor, **inputs: Any) -> Tensor:
    """A classifier's scores of the tokens at the given positions, fp32, [N, K].

    The position of a token is told, not searched for by the id of the padding token as transformers does: so a score
    does not depend on padding, and a sequence may end with that id.

    Args:
        model: A model with a layer `score`, with or without adapters.
        read_at: Positions, row * T + position, [N].
        **inputs: As of `hidden_states`.
    """
    hidden = hidden_states(model, **inputs).flatten(0, 1).index_select(0, read_at)
    head = output_head(model)
    with without_autocast(hidden):
        scores: Tensor = head(hidden.to(next(head.parameters()).dtype)).float()
    return scores


def head_loss(
    model: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed loss and number of argmax hits of the model's own logits at these hidden states.

    Args:
        model: A causal language model, with or without adapters.
        hidden: Hidden states that predict the targets, [N, D].
        targets: Token ids, [N].
        weights: Weight of each target, [N].
        label_smoothing: Probability spread evenly over the vocabulary.
        chunk_size: Positions whose logits exist at one time; None chooses by the device.
    """
    head = output_head(model)
    if not is_product(head):
        return token_cross_entropy(_shaped(model, head(hidden)), targets, weights, label_smoothing)
    scale, softcap = _logit_shape(model)

    def loss(hidden: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = head_weight(head)
        return linear_cross_entropy(
            local(hidden),
            weight,
            targets,
            weights,
            bias=bias,
            label_smoothing=label_smoothing,
            scale=scale,
            softcap=softcap,
            chunk_size=chunk_size,
        )

    with _forward(head, loss):
        found: tuple[Tensor, Tensor] = head(hidden)
    return found


def token_logps(model: nn.Module, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each target under the model's own logits, [N] in fp32; it can be trained on.

    Args:
        model: A causal language model.
        hidden: Hidden states that predict the targets, [N, D].
        targets: Token ids, [N].
        temperature: Divides the logits.
    """
    head = output_head(model)
    if not is_product(head):
        return _logps_of_layer(model, head, hidden, targets, temperature)[0]
    scale, softcap = _logit_shape(model)

    def logps(hidden: Tensor) -> Tensor:
        weight, bias = head_weight(head)
        shape: dict[str, Any] = {"bias": bias, "scale": scale, "softcap": softcap, "temperature": temperature}
        return linear_logps(local(hidden), weight, targets, **shape)

    with _forward(head, logps):
        found: Tensor = head(hidden)
    return found


def token_logps_with_entropies(
    model: nn.Module, hidden: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """What `token_logps` returns, and the entropy of each position's distribution, [N] each."""
    head = output_head(model)
    if not is_product(head):
        return _logps_of_layer(model, head, hidden, targets, temperature)
    scale, softcap = _logit_shape(model)

    def both(hidden: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = head_weight(head)
        shape: dict[str, Any] = {"bias": bias, "scale": scale, "softcap": softcap, "temperature": temperature}
        return linear_logps_and_entropies(local(hidden), weight, targets, **shape)

    with _forward(head, both):
        found: tuple[Tensor, Tensor] = head(hidden)
    return found


def _logps_of_layer(
    model: nn.Module, head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies where the head is more than a product, [N] each.

    All chunks in one call of the head, so that its weights are gathered once on each rank, whatever N is there; the
    logits of a chunk are made again in the backward pass.
    """
    plain = head.forward

    def of_chunk(rows: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        return token_logps_and_entropies(_shaped(model, plain(rows)) / temperature, wanted)

    def both(hidden: Tensor) -> tuple[Tensor, Tensor]:
        size = _chunk_size(model, hidden)
        chunks = zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
        parts = [checkpoint(of_chunk, rows, wanted, use_reentrant=False) for rows, wanted in chunks]
        logps, entropies = zip(*parts, strict=True)
        return torch.cat(logps), torch.cat(entropies)

    with _forward(head, both):
        found: tuple[Tensor, Tensor] = head(hidden)
    return found


def head_divergence(
    student: nn.Module,
    teacher: nn.Module,
    hidden: Tensor,
    teacher_hidden: Tensor,
    weights: Tensor,
    beta: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the divergences of the student's distributions from the teacher's, and each of them, [N].

    Where one has more rows in its output embedding, as padding, the distributions are those over the rows of both.

    Args:
        student: A causal language model.
        teacher: Another one with the same tokenizer; no gradient reaches it.
        hidden: The student's last hidden states, [N, D].
        teacher_hidden: The teacher's at the same positions, [N, E].
        weights: Weight of each position in the sum, [N].
        beta: As of `token_divergence`.
        temperature: Divides the logits of both.

    Returns:
        The sum, with gradient, and the divergences without, in nats, fp32 at least.
    """
    head, teacher_head = output_head(student), output_head(teacher)
    plain, teacher_plain = head.forward, teacher_head.forward
    products = is_product(head) and is_product(teacher_head)

    def of_chunk(rows: Tensor, teacher_rows: Tensor) -> Tensor:
        logits = _shaped(student, plain(rows))
        with torch.no_grad():
            teacher_logits = _shaped(teacher, teacher_plain(teacher_rows))
        size = min(logits.shape[1], teacher_logits.shape[1])
        return token_divergence(logits[:, :size], teacher_logits[:, :size], beta, temperature)

    def divergence(hidden: Tensor, teacher_hidden: Tensor) -> tuple[Tensor, Tensor]:
        if products:
            heads = _same_rows(_linear_head(student, head), _linear_head(teacher, teacher_head))
            return linear_divergence(
                local(hidden), heads[0], local(teacher_hidden), heads[1], weights, beta=beta, temperature=temperature
            )
        size = _chunk_size(student, hidden)
        chunks = zip(torch.split(hidden, size), torch.split(teacher_hidden, size), strict=True)
        found = torch.cat([checkpoint(of_chunk, *rows, use_reentrant=False) for rows in chunks])
        return (found * weights).sum(), found.detach()

    def in_both(hidden: Tensor) -> tuple[Tensor, Tensor]:  # where the weights of both heads are gathered
        with _forward(teacher_head, lambda teacher_hidden: divergence(hidden, teacher_hidden)):
            found: tuple[Tensor, Tensor] = teacher_head(teacher_hidden)
        return found

    with _forward(head, in_both):
        both: tuple[Tensor, Tensor] = head(hidden)
    return both


def _chunk_size(model: nn.Module, hidden: Tensor) -> int:
    return default_chunk_size(hidden.device, base_model(model).config.get_text_config().vocab_size)


def _linear_head(model: nn.Module, head: nn.Module) -> LinearHead:
    weight, bias = head_weight(head)
    return LinearHead(weight, bias, *_logit_shape(model))


def _same_rows(one: LinearHead, other: LinearHead) -> tuple[LinearHead, LinearHead]:
    """Both heads without the rows that only one of them has."""
    size = min(len(one.weight), len(other.weight))
    return _first_rows(one, size), _first_rows(other, size)


def _first_rows(head: LinearHead, size: int) -> LinearHead:
    if len(head.weight) == size:
        return head
    return replace(head, weight=head.weight[:size], bias=None if head.bias is None else head.bias[:size])


@torch.no_grad()
def check_head(model: nn.Module, input_ids: Tensor) -> None:
    """Compare the logits that `head_loss` assumes with the model's own on a few tokens.

    Raises:
        ConfigError: If they differ: the architecture does something to its logits that is not known here.
    """
    training = model.training
    model.eval()
    expected = model(input_ids=input_ids, use_cache=False).logits[:, -input_ids.shape[1] :].float()
    hidden = hidden_states(model, input_ids=input_ids)
    found = _shaped(model, output_head(model)(hidden)).float()
    model.train(training)
    share = 1e-5 if expected.dtype == torch.float32 == hidden.dtype else 1e-2
    if not float((expected - found).abs().max()) <= share * float(expected.abs().max()):
        raise ConfigError(
            f"{type(base_model(model)).__name__}: its logits are not those of its output embedding "
            f"(largest difference {float((expected - found).abs().max()):.3g}), so the loss would be wrong. "
            "Please report this architecture."
        )


def router_weight(model: nn.Module) -> float:
    """What the architecture multiplies its router loss with; 0 if its configuration asks for none."""
    config = base_model(model).config.get_text_config().to_dict()
    return float(config.get("router_aux_loss_coef") or 0.0) if config.get("output_router_logits") else 0.0


def _logit_shape(model: nn.Module) -> tuple[float, float | None]:
    """Scale and soft cap that the architecture puts on its logits."""
    config = base_model(model).config.get_text_config().to_dict()
    scale = config.get("logit_scale") or 1.0
    if config.get("logits_scaling"):
        scale /= config["logits_scaling"]
    return float(scale), config.get("final_logit_softcapping") or config.get("logits_soft_cap")


def _shaped(model: nn.Module, logits: Tensor) -> Tensor:
    scale, softcap = _logit_shape(model)
    logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap

"""What a retriever and a generator can be trained on together, and which settings go with it.

B questions, C contexts, K passages of a question, T answer tokens
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from lit_alignment.data.passages import Passage
from lit_alignment.errors import ConfigError
from lit_alignment.losses import rag_sequence_loss, rag_token_loss, retriever_loss
from lit_alignment.models.dual_encoder import RetrieverConfig
from lit_alignment.retrieval.passage_retriever import TrainedTowers

Objective = Literal[
    "language_modeling",
    "rag_sequence",
    "rag_token",
    "emdr2",
    "perplexity_distillation",
    "leave_one_out",
    "replug",
]
MARGINAL = ("rag_sequence", "rag_token")  # they sum over the passages


# From C lists of passages a question: log-probabilities of the answer tokens, [B, C, T], and their weights, [B, T].
AnswerLogps = Callable[[Sequence[Sequence[Sequence[Passage]]]], tuple[Tensor, Tensor]]


def objective_losses(
    objective: Objective,
    answer_logps: AnswerLogps,
    passages: Sequence[Sequence[Passage]],
    scores: Tensor,
    train_retriever: bool,
    train_generator: bool,
    temperature: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Loss of each answer, loss of the retriever for each question or None, and trained weight of each answer, [B].

    Args:
        objective: What is trained on.
        answer_logps: What the generator makes of the answers after lists of passages.
        passages: K passages of each question.
        scores: Their scores, [B, K].
        train_retriever: Whether the retriever learns.
        train_generator: Whether the generator learns.
        temperature: Of the target distribution of the retriever, where the objective has one.
    """
    alone = [[[passage] for passage in own] for own in passages]
    if objective in MARGINAL:
        logps, weights = answer_logps(alone)
        if objective == "rag_token":
            return rag_token_loss(scores, logps, weights), None, weights.sum(-1)
        return rag_sequence_loss(scores, (logps * weights[:, None]).sum(-1)), None, weights.sum(-1)
    together, weights = answer_logps([[own] for own in passages])
    answers = -(together[:, 0] * weights).sum(-1)
    if not train_retriever:
        return answers, None, weights.sum(-1)
    if not train_generator:
        answers = answers.detach()
    if objective == "leave_one_out":
        contexts: list[list[list[Passage]]] = [[[*own[:k], *own[k + 1 :]] for k in range(len(own))] for own in passages]
    else:
        contexts = alone
    with torch.no_grad():
        logps, weights = answer_logps(contexts)
        sums = (logps * weights[:, None]).sum(-1)  # [B, K]
        means = sums / weights.sum(-1, keepdim=True)
    return answers, retriever_loss(objective, scores, sums, means, temperature), weights.sum(-1)


def check_objective(
    objective: Objective,
    num_passages: int,
    train_retriever: TrainedTowers,
    train_generator: bool,
    retriever: RetrieverConfig,
) -> None:
    """Refuse what would train nothing, or something else than it says.

    Raises:
        ConfigError: Naming the setting.
    """
    learns = train_retriever != "none"
    if learns and num_passages < 2:
        raise ConfigError(
            f"model.num_passages is {num_passages}: the softmax over one passage is always 1, so the "
            "retriever would get no gradient. Use 2 or more, or set train_retriever to none."
        )
    if learns and objective == "language_modeling":
        raise ConfigError(
            "model.objective: language_modeling does not train a retriever. Choose another objective, "
            "or set train_retriever to none."
        )
    if not learns and objective not in ("language_modeling", *MARGINAL):
        raise ConfigError(
            f"model.objective: {objective} is a loss of the retriever, and train_retriever is none. "
            "Use language_modeling, or train the retriever."
        )
    if not learns and not train_generator:
        raise ConfigError("model.train_generator is false and train_retriever none: nothing would learn.")
    if train_retriever == "query" and retriever.towers == "shared":
        raise ConfigError(
            "model.train_retriever: the query tower cannot train alone while the towers are shared. "
            "Set retriever.towers to separate, or train_retriever to both."
        )
    if objective == "leave_one_out" and num_passages < 2:
        raise ConfigError("model.objective: leave_one_out needs num_passages of 2 or more.")

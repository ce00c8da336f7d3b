"""What a retriever and a generator can be trained on together, and which settings go with it."""

from typing import Literal

from lit_alignment.errors import ConfigError
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

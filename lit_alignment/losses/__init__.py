"""Losses: plain functions on tensors."""

from lit_alignment.losses.classification import (
    balanced_class_weights,
    focal_loss,
    multi_label_loss,
    regression_loss,
)
from lit_alignment.losses.distillation import LinearHead, linear_divergence, token_divergence
from lit_alignment.losses.language_modeling import (
    linear_cross_entropy,
    linear_logps,
    linear_logps_and_entropies,
    token_cross_entropy,
    token_logps_and_entropies,
)
from lit_alignment.losses.retrieval import (
    emdr2_loss,
    info_nce_loss,
    leave_one_out_loss,
    perplexity_distillation_loss,
    rag_sequence_loss,
    rag_token_loss,
    replug_loss,
    retriever_loss,
)
from lit_alignment.losses.reward import bradley_terry_loss, centering_penalty, outcome_loss, plackett_luce_loss

__all__ = [
    "LinearHead",
    "balanced_class_weights",
    "bradley_terry_loss",
    "centering_penalty",
    "emdr2_loss",
    "focal_loss",
    "info_nce_loss",
    "leave_one_out_loss",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_logps",
    "linear_logps_and_entropies",
    "multi_label_loss",
    "outcome_loss",
    "perplexity_distillation_loss",
    "plackett_luce_loss",
    "rag_sequence_loss",
    "rag_token_loss",
    "regression_loss",
    "replug_loss",
    "retriever_loss",
    "token_cross_entropy",
    "token_divergence",
    "token_logps_and_entropies",
]

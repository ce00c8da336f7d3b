"""Losses: plain functions on tensors."""

from lit_alignment.losses.classification import (
    balanced_class_weights,
    focal_loss,
    multi_label_loss,
    regression_loss,
)
from lit_alignment.losses.language_modeling import linear_cross_entropy, token_cross_entropy
from lit_alignment.losses.reward import bradley_terry_loss, centering_penalty, outcome_loss, plackett_luce_loss

__all__ = [
    "balanced_class_weights",
    "bradley_terry_loss",
    "centering_penalty",
    "focal_loss",
    "linear_cross_entropy",
    "multi_label_loss",
    "outcome_loss",
    "plackett_luce_loss",
    "regression_loss",
    "token_cross_entropy",
]

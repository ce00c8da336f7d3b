"""Prompts for policy optimisation."""

from lit_alignment.data.rollout import RolloutDataModule


class PolicyDataModule(RolloutDataModule):
    """Prompts of chat records, whose responses are sampled in training and scored by reward functions.

    Settings are those of RolloutDataModule.
    """

"""Which way the reference of a policy is held."""

from typing import Literal

from peft import PeftConfig

from lit_alignment.errors import ConfigError
from lit_alignment.losses.policy_config import PolicyLossConfig
from lit_alignment.losses.preference_config import LossConfig
from lit_alignment.models.adapters import AdapterConfig
from lit_alignment.models.reference import leaves_base

ReferenceKind = Literal["auto", "adapter_off", "frozen_copy", "cached", "none"]


def reference_of(
    wanted: ReferenceKind,
    losses: list[LossConfig],
    peft: PeftConfig | None,
    adapter: AdapterConfig | None,
    follows: bool = False,
) -> ReferenceKind:
    """How the reference is held.

    Args:
        wanted: What the configuration asks for.
        losses: What it is for.
        peft: New adapters.
        adapter: An existing one.
        follows: Whether the reference follows the policy.

    Raises:
        ConfigError: If the losses need another one, or none.
    """
    kinds = {loss.form.of for loss in losses}
    if len(kinds) > 1:
        raise ConfigError("model.losses: losses of pairs and of responses judged alone do not go together.")
    comparing = [loss.name for loss in losses if loss.form.needs_reference]
    if not comparing:
        if follows:
            raise ConfigError(f"model.reference_sync: {losses[0].name} is compared with no reference. Remove it.")
        if wanted not in ("auto", "none"):
            raise ConfigError(
                f"model.reference is {wanted}, and {losses[0].name} is compared with no reference. Remove it."
            )
        return "none"
    if wanted == "none":
        raise ConfigError(f"model.reference is none, and {comparing[0]} needs one. Set it to auto.")
    if follows:
        _check_following(wanted, adapter)
        return "frozen_copy"
    if wanted == "adapter_off":
        if peft is None and adapter is None:
            raise ConfigError("model.reference is adapter_off, and there are no adapters. Set it to auto.")
        if peft is not None and not leaves_base(peft):
            raise ConfigError(
                "model.reference is adapter_off, and these adapters change the base weights when they begin, or train "
                "its biases, so that without them it is another model. Set init_lora_weights: true and bias: none."
            )
    new = peft is not None and leaves_base(peft)
    mismatched = [loss.name for loss in losses if loss.form.baseline == "mismatched"]
    if wanted == "cached" and mismatched:
        raise ConfigError(
            f"model.reference is cached, and {mismatched[0]} also reads responses behind other prompts, which change "
            "with each step. Set it to auto."
        )
    if wanted == "auto":
        if new:
            return "adapter_off"
        return "frozen_copy" if mismatched or adapter is not None else "cached"
    if wanted == "frozen_copy" and new:
        raise ConfigError("model.reference: a copy would hold what new adapters switched off are: use adapter_off.")
    return wanted


def reference_of_policy(
    wanted: ReferenceKind, loss: PolicyLossConfig, peft: PeftConfig | None, adapter: AdapterConfig | None
) -> ReferenceKind:
    """How the reference is held whose distance from the policy is a part of its loss.

    Args:
        wanted: What the configuration asks for.
        loss: What it is for.
        peft: New adapters.
        adapter: An existing one.

    Raises:
        ConfigError: If the loss needs another one, or none.
    """
    if not loss.needs_reference:
        if wanted not in ("auto", "none"):
            raise ConfigError(f"model.reference is {wanted}, and model.loss.kl_weight is 0. Remove one of them.")
        return "none"
    new = peft is not None and leaves_base(peft)
    match wanted:
        case "none":
            raise ConfigError("model.reference is none, and model.loss.kl_weight needs one. Set it to auto.")
        case "cached":
            raise ConfigError("model.reference is cached, and responses are not known before. Set it to auto.")
        case "adapter_off" if not new:
            raise ConfigError(
                "model.reference is adapter_off, and there are no new adapters to switch off. Set it to auto."
            )
        case "frozen_copy" if new:
            raise ConfigError("model.reference: a copy would hold what new adapters switched off are. Set it to auto.")
        case "auto":
            return "adapter_off" if new else "frozen_copy"
    return wanted


def _check_following(wanted: ReferenceKind, adapter: AdapterConfig | None) -> None:
    """Refuse a reference that cannot follow, or has nothing to follow."""
    if wanted not in ("auto", "frozen_copy"):
        raise ConfigError(
            f"model.reference is {wanted}, which stays as it is, and model.reference_sync lets it follow. Set one of "
            "them: reference to auto, or reference_sync to null."
        )
    if adapter is not None and not adapter.trainable:
        raise ConfigError("model.reference_sync: the adapter does not train. Set model.adapter.trainable to true.")

"""What somebody should know of preference data, and of a training on them, before it is too late."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_alignment.data.examples import column
from lit_alignment.data.sources.record_batches import CachedRows
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError
from lit_alignment.losses.preference_config import FORMS, LossConfig

BALANCED = (1.0, 4 / 3)  # weighted good over weighted bad responses, as KTO's authors advise
FOLLOWS = 0.5  # correlation of margins with lengths that is worth a line
ENOUGH = 32  # pairs, for a correlation to say something


def check_margins(examples: Mapping[str, CachedRows], losses: Sequence[LossConfig]) -> None:
    """Refuse pairs without the margins that a loss reads, and say so if no loss reads those that are there.

    Args:
        examples: Of each split.
        losses: What is computed.

    Raises:
        ConfigError: Naming the first record.
    """
    reading = [loss.name for loss in losses if loss.form.margin]
    for split, rows in examples.items():
        if split == "predict":  # prompts
            continue
        judged = np.flatnonzero(column(rows, "weight"))  # chats have no margin to miss
        known = ~np.isnan(column(rows, "margin")[judged])
        if reading and not known.all():
            (first,) = rows.rows([int(judged[np.argmin(known)])])
            where = f"{np.sum(~known)} of {len(known)} records of data.{split}"
            raise ConfigError(
                f"model.losses: {reading[0]} reads the records' margins, and {where} have none, the first is "
                f"{first['dataset']}/{first['id']}. Give each a 'margin', or choose another loss."
            )
        if not reading and known.any() and split == "train":
            readers = ", ".join(name for name, form in FORMS.items() if form.margin)
            rank_zero_info(
                f"{np.sum(known)} of {len(known)} records have a margin, which {losses[0].name} does not read: the "
                f"order alone counts (losses that read it: {readers})"
            )


def check_chats(weight: float, chats: Sequence[SourceConfig]) -> None:
    """Refuse a weight of chats that has no effect, or no sense.

    Raises:
        ConfigError: If there are no chats, or it is not above 0.
    """
    if weight != 1.0 and not chats:
        raise ConfigError(f"model.chat_weight is {weight}, and there are no chats. Give data.chats, or remove it.")
    if not 0 < weight < math.inf:
        raise ConfigError(f"model.chat_weight is {weight}; use more than 0.")


def check_streamed_losses(losses: Sequence[LossConfig], reference: str) -> None:
    """Refuse what looks at all records before training, or at those of other ranks, where records are streamed.

    Args:
        losses: What is computed.
        reference: How the reference is held.

    Raises:
        ConfigError: Naming the setting.
    """
    if reference == "cached":
        raise ConfigError(
            "model.reference: cached is computed of all records before training, and data.streaming is true. Choose "
            "another reference, or set data.streaming to false."
        )
    for loss in losses:
        if loss.form.baseline == "mismatched" or loss.form.margin:
            what = "margins of all records" if loss.form.margin else "responses of all ranks to compare"
            raise ConfigError(
                f"model.losses: {loss.name} needs {what}, which data.streaming does not have. Set that to false, or "
                "choose another loss."
            )


def check_balance(examples: CachedRows, loss: LossConfig) -> None:
    """Say how many responses are good and how many bad, and which weights would balance them if these do not.

    Source: Ethayarajh et al. 2024 (arXiv:2402.01306), section 4.2.
    """
    scores: Any = np.asarray(pc.list_flatten(examples.column("scores")))
    good, bad = int((scores > 0).sum()), int((scores <= 0).sum())
    weights = loss.setting("desirable_weight"), loss.setting("undesirable_weight")
    rank_zero_info(f"{good} good responses with weight {weights[0]:g}, {bad} bad ones with weight {weights[1]:g}")
    if not good or not bad:
        return
    found = weights[0] * good / (weights[1] * bad)
    if not BALANCED[0] - 1e-9 <= found <= BALANCED[1] + 1e-9:
        low, high = (weights[1] * bad / good * bound for bound in BALANCED)
        most, least = (weights[0] * good / bad / bound for bound in BALANCED)
        rank_zero_warn(
            f"model.losses: {loss.name}'s good and bad responses weigh {found:.2f} to 1, and 1 to 1.33 is advised. Set "
            f"desirable_weight to {low:.2f} up to {high:.2f}, or undesirable_weight to {least:.2f} up to {most:.2f}."
        )


def what_to_say(first: dict[str, float], now: dict[str, float], pairs: int, said: set[str]) -> list[str]:
    """What a validation shows that loss and accuracy hide, each once.

    Args:
        first: Values of the run's first validation.
        now: Of the last one.
        pairs: How many were validated.
        said: What was said before; added to.
    """
    found = {}
    if now["chosen_logp"] < first["chosen_logp"] and now["margin"] > first["margin"]:
        found["displaced"] = (
            f"the margin rises ({first['margin']:.3g} to {now['margin']:.3g}) while the chosen responses become less "
            f"likely ({first['chosen_logp']:.4g} to {now['chosen_logp']:.4g} nats). If answers get worse, add the loss "
            "sft, use dpop or apo_zero, or lower the learning rate."
        )
    follows = now.get("length_correlation", 0.0)
    if abs(follows) > FOLLOWS and pairs >= ENOUGH:
        found["length"] = (
            f"margins go with the difference in length (correlation {follows:.2f}): the model may learn to answer at "
            "greater length. Losses of means (sigmoid_norm, simpo), length_penalty or ld_dpo depend on it less."
        )
    fresh = [text for name, text in found.items() if name not in said]
    said.update(found)
    return fresh

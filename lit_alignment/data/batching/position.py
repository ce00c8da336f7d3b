"""Where in an epoch a training stands, in records: under another plan, each of the others is trained once."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lit_alignment.data.batching.packing import BatchPlan, Stretch
from lit_alignment.data.batching.standing import Standing, standing_of, write_standing
from lit_alignment.errors import CheckpointError
from lit_alignment.files import conformed

FROM_WEIGHTS = "start a new run from its weights: export it, and give the folder as model.adapter or model.backbone"


@dataclass(frozen=True)
class Window:
    """What one optimizer step takes.

    Args:
        ranks: Processes with batches of their own.
        accumulate: Micro-batches of each.
    """

    ranks: int
    accumulate: int


@dataclass(frozen=True)
class Begun:
    """The epoch in which a resumed training stands.

    Args:
        epoch: Its number.
        global_step: Optimizer steps of the run until then.
        batches: Micro-batches of each rank in this epoch, as Lightning counts them on.
        stretches: What of the epoch was trained.
        left: Micro-batches of all ranks that are left; None for all of the plan.
        changed: What of the plan is another than it was.
    """

    epoch: int
    global_step: int = 0
    batches: int = 0
    stretches: Sequence[Stretch] = ()
    left: int | None = None
    changed: Sequence[str] = ()


def epoch_length(plan: BatchPlan, begun: Begun, ranks: int) -> int:
    """Micro-batches of each rank in an epoch, those that were trained before a resume included."""
    left = plan.num_groups if begun.left is None else begun.left
    return begun.batches - (-left // ranks)


def write_position(plan: BatchPlan, at: Standing, begun: Begun, window: Window, global_step: int) -> dict[str, Any]:
    """Where a training stands, as plain values.

    Args:
        plan: Of the training data.
        at: The last optimizer step.
        begun: The epoch as this run began it.
        window: Of the run's steps.
        global_step: Optimizer steps so far.
    """
    stretches = list(begun.stretches) if at.steps else []
    used = (at.batches - begun.batches) * window.ranks if at.steps else 0
    if used > 0:
        left = plan.num_groups if begun.left is None else begun.left
        own = Stretch(*plan.settings, min(used, left))
        if stretches and replace(stretches[-1], used=0) == replace(own, used=0):
            own = replace(own, used=own.used + stretches.pop().used)
        stretches.append(own)
    written = {"epoch": at.epoch, "steps": at.steps, "batches": at.batches, "global_step": global_step}
    return written | asdict(window) | {"stretches": [asdict(each) for each in stretches]}


def update_position(checkpoint: dict[str, Any], stored: dict[str, Any], plan: BatchPlan, window: Window) -> None:
    """Take a position in its form, and bring what an earlier version wrote, `{epoch, used}`, into today's form.

    Args:
        checkpoint: One of Lightning's, whose counters may stand inside of a batch.
        stored: The data module's part of it.
        plan: Of the training data.
        window: Of this run's steps.
    """
    own = write_position(replace(plan, tokens_per_batch=None), Standing(0, 1, 1), Begun(0), window, 0)
    form = own if "stretches" in stored["train"] else {"epoch": 0, "used": 0}
    position = stored["train"] = conformed(stored["train"], form, "train", counts=True)
    if form is own:
        return
    ranks = checkpoint["lit_alignment"].get("ranks") or window.ranks
    at = standing_of(checkpoint, position["used"] // ranks)
    write_standing(checkpoint, at, is_last=at.steps > 0 and position["used"] >= plan.num_groups)
    stretches = [asdict(Stretch(*plan.settings, min(position["used"], plan.num_groups)))] if at.steps else []
    written = {"epoch": at.epoch, "steps": at.steps, "batches": at.batches, "global_step": checkpoint["global_step"]}
    stored["train"] = written | {"ranks": ranks, "accumulate": window.accumulate, "stretches": stretches}


def read_position(plan: BatchPlan, position: dict[str, Any], window: Window) -> Begun:
    """The same again, counted in this run's windows.

    Args:
        plan: Of the training data.
        position: As written.
        window: Of this run's steps.
    """
    stretches = [Stretch(**each) for each in position["stretches"]]
    last = stretches[-1] if stretches else Stretch(*plan.settings, 0)
    then: dict[str, Any] = {"ranks": position["ranks"], "accumulate_grad_batches": position["accumulate"]}
    now: dict[str, Any] = {"ranks": window.ranks, "accumulate_grad_batches": window.accumulate}
    then |= {"tokens_per_batch": last.tokens_per_batch, "batch_size": last.batch_size}
    now |= {"tokens_per_batch": plan.tokens_per_batch, "batch_size": plan.batch_size}
    changed = [f"{name} {then[name]} -> {now[name]}" for name in then if then[name] != now[name]]
    left = len(plan.left(position["epoch"], stretches)) if stretches else None
    batches = position["batches"]
    if changed and left is not None:
        # Lightning steps where its count is a multiple of the window's length, and an epoch is as long as ever.
        missing = -(-plan.num_groups // window.ranks) - (-(-left // window.ranks))
        batches = max(1, -(-missing // window.accumulate)) * window.accumulate
    return Begun(position["epoch"], position["global_step"], batches, stretches, left, changed)


def identity(
    lengths: NDArray[np.int64], weights: NDArray[np.float64], ids: pa.ChunkedArray, seed: int
) -> dict[str, Any]:
    """What must be the same when a training is resumed: the examples, and what decides their order.

    Args:
        lengths: Tokens of each example.
        weights: Trained weight of each example.
        ids: Of their records.
        seed: Of the order.
    """
    digest = hashlib.sha256(lengths.tobytes() + weights.tobytes())
    for chunk in ids.chunks:
        digest.update("\n".join(chunk.to_pylist()).encode())
    tokens = int(lengths.sum())
    return {"seed": seed, "examples": len(lengths), "tokens": tokens, "fingerprint": digest.hexdigest()[:16]}


def refuse_other_data(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to resume on other data.

    Args:
        then: `identity` of the checkpoint's data.
        now: Of this run's.

    Raises:
        CheckpointError: Naming what differs.
    """
    different = [f"{name} {then.get(name)}, now {value}" for name, value in now.items() if then.get(name) != value]
    if different:
        raise CheckpointError(
            f"the checkpoint was trained on other data, or in another order: {'; '.join(different)}. Resume with the "
            f"same data, data.encoding, data.seed and data.share_prompts; or {FROM_WEIGHTS}."
        )

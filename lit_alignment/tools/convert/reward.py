"""train_rm and inference_rm: reward models."""

from lit_alignment.tools.convert.settings import Extras, Settings

MARGIN = "use_margin: false, as margins of the records (precomputed_margin) had no effect there; true takes them in."
WINDOWS = """each response was cut with a prompt of its own there, so the two could see different ones; here the \
prompt is shortened once for both"""
REJECTED = "rejected_reward and reward_difference were wrong there; val/rejected_reward and val/margin are not"
SHARED = """packing: true with tokens_per_batch, instead of batch_size, reads a prompt once for both responses, and \
trains the same loss faster."""
REMARKS = (MARGIN, SHARED)


def pairs(top: Settings, old: Settings, folder: str) -> Extras:
    """Further settings of a reward model of pairs."""
    top.warn(WINDOWS, "train_dataset_settings")
    top.warn(WINDOWS, "val_dataset_settings")
    top.warn(REJECTED, "metrics")
    return {"use_margin": False}, {}

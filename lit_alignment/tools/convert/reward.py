"""train_rm and inference_rm: reward models."""

from typing import Any

from lit_alignment.tools.convert.document import Document
from lit_alignment.tools.convert.fit import Method, training_document
from lit_alignment.tools.convert.inference import scored_documents
from lit_alignment.tools.convert.settings import Settings

MARGIN = "use_margin: false, as margins of the records (precomputed_margin) had no effect there; true takes them in."
WINDOWS = (
    "each response was cut with a prompt of its own there, so the two could see different ones; here the prompt is "
    "shortened once for both"
)
REJECTED = "rejected_reward and reward_difference were wrong there; val/rejected_reward and val/margin are not"
LABELS = "batches have them, and the loss has no use for them, as there"
SHARED = (
    "packing: true with tokens_per_batch, instead of batch_size, reads a prompt once for both responses, and trains "
    "the same loss faster."
)


def convert(top: Settings) -> list[Document]:
    """Our configuration for `fit`."""
    data: dict[str, Any] = {}
    for name in ("train_dataset_settings", "val_dataset_settings"):
        old = top.part(name)
        if old.take("add_labels", True) and "add_labels" in old:
            data["add_labels"] = True
            top.notes.warn(f"{old.path_of('add_labels')} -> data.add_labels", LABELS)
        top.notes.warn(name, WINDOWS)
    top.notes.warn("metrics", REJECTED)
    method = Method(
        "Reward",
        "a reward model of pairs",
        scores=True,
        module={"use_margin": False},
        data=data,
        remarks=(MARGIN, SHARED),
    )
    return [training_document(top, method)]


def convert_inference(top: Settings) -> list[Document]:
    """Our configurations for `predict`, one a model."""
    return scored_documents(top, "Reward", "rewards of responses", lambda model: {})

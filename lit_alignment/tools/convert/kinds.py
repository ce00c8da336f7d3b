"""Which command of turbo-alignment a configuration is for, and what converts it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lit_alignment.errors import ConfigError
from lit_alignment.tools.convert import classification, merge, multimodal, preference, rag, reward, sampling
from lit_alignment.tools.convert.document import Document, Method
from lit_alignment.tools.convert.fit import training_documents
from lit_alignment.tools.convert.inference import predictions
from lit_alignment.tools.convert.settings import Settings

PREFERENCES = {
    "dpo": Method("Preference", "preferences of pairs", False, preference.pairs, preference.REMARKS, compares="pairs"),
    "ddpo": Method(
        "Preference", "a reward model's preferences", False, preference.distilled, preference.REMARKS, compares="pairs"
    ),
    "kto": Method("Preference", "KTO", False, preference.responses, preference.KTO_REMARKS, compares="responses"),
}
TRAINED = {
    "sft": Method("SFT", "supervised fine-tuning"),
    "rm": Method("Reward", "a reward model of pairs", True, reward.pairs, reward.REMARKS),
    "classification": Method("Classification", "classification", True, classification.loss, classification.REMARKS),
    "multimodal": Method("VLM", "a language model that sees images", False, multimodal.media, multimodal.REMARKS),
    "rag": Method("RAG", "a retriever and a generator", False, rag.retrieval, rag.REMARKS, rag.GENERATOR),
    **PREFERENCES,
}
ANSWERING = {
    "chat": Method("SFT", "answers to prompts"),
    "rm": Method("Reward", "rewards of responses", True),
    "classification": Method("Classification", "classes of conversations", True, classification.named_labels),
    "multimodal": Method("VLM", "answers about images", False, multimodal.media),
    "rag": Method("RAG", "answers with passages", False, rag.retrieval, rag.REMARKS, rag.GENERATOR),
}
CONVERTERS: dict[str, Callable[[Settings], list[Document]]] = {
    **{f"train_{name}": partial(training_documents, method) for name, method in TRAINED.items()},
    **{f"inference_{name}": partial(predictions, method) for name, method in ANSWERING.items()},
    **dict.fromkeys(("random_sample", "rm_sample", "rso_sample"), sampling.convert),
    "merge_adapters_to_base": merge.convert,
    "preprocess_multimodal_dataset": multimodal.convert_preprocess,
}
SHORT = {name: f"train_{name}" for name in ("sft", "classification", "rm", "rag", *PREFERENCES)}
SHORT |= {"inference": "inference_chat", "merge": "merge_adapters_to_base"}


def kind_of(values: dict[str, Any], path: Path) -> str:
    """The old command, told from the keys; a ConfigError that names the file where they do not tell."""
    if "encoder_settings" in values and ("reader_settings" in values or "reader" in values):
        return "preprocess_multimodal_dataset"
    for stage, key in (("inference", "inference_settings"), ("train", "train_dataset_settings")):
        if key in values:
            return f"{stage}_{_method(values, stage)}"
    if "N" in values:
        return "rso_sample" if "beta" in values else "rm_sample" if "rm" in values else "random_sample"
    if "adapter_path" in values and "save_path" in values:
        return "merge_adapters_to_base"
    found = ", ".join(values) or "nothing"
    raise ConfigError(f"{path}: the keys do not tell which command this is for (found: {found}). Give --kind.")


def _method(values: dict[str, Any], stage: str) -> str:
    models = values.get("inference_settings", [values])
    model = _section(models[0] if isinstance(models, list) and models else {}, "model_settings")
    if "generator_settings" in model or "retrieval_settings" in model:
        return "rag"
    scores = str(model.get("model_type")).startswith("seq_cls")
    dataset = _section(values, "dataset_settings" if stage == "inference" else "train_dataset_settings")
    match stage, dataset.get("dataset_type"):
        case _, "multimodal" | "classification" as kind:
            return str(kind)
        case "inference", kind:
            return "rm" if scores or kind in ("rm", "pair_preferences", "sampling") else "chat"
        case _, "kto" | "ddpo" as kind:
            return str(kind)
        case _, "pair_preferences":
            arguments = _section(values, "training_arguments") | _section(values, "trainer_settings")
            preference = "loss_settings" in arguments or "use_ref_model" in arguments
            return "ddpo" if "rm_settings" in values else "dpo" if preference or not scores else "rm"
    if "modality_encoder_settings_mapping" in values:
        return "multimodal"
    return "classification" if scores else "sft"


def _section(values: Any, key: str) -> dict[str, Any]:
    part = values.get(key) if isinstance(values, dict) else None
    return part if isinstance(part, dict) else {}

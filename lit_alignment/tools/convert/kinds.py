"""Which command of turbo-alignment a configuration is for."""

from pathlib import Path
from typing import Any

from lit_alignment.errors import ConfigError

KINDS = (
    "train_sft",
    "train_dpo",
    "train_kto",
    "train_ddpo",
    "train_rm",
    "train_classification",
    "train_multimodal",
    "train_rag",
    "inference_chat",
    "inference_rm",
    "inference_classification",
    "inference_multimodal",
    "inference_rag",
    "random_sample",
    "rm_sample",
    "rso_sample",
    "merge_adapters_to_base",
    "preprocess_multimodal_dataset",
)


SHORT = {
    "sft": "train_sft",
    "classification": "train_classification",
    "rm": "train_rm",
    "rag": "train_rag",
    "inference": "inference_chat",
    "merge": "merge_adapters_to_base",
}


def kind_of(values: dict[str, Any], path: Path) -> str:
    """The old command, told from the keys.

    Args:
        values: The old configuration.
        path: Its file, for the message.

    Raises:
        ConfigError: If the keys do not tell.
    """
    if "reader_settings" in values and "encoder_settings" in values:
        return "preprocess_multimodal_dataset"
    if "inference_settings" in values:
        return _inference(values)
    if "train_dataset_settings" in values:
        return _training(values)
    if "N" in values:
        return "rso_sample" if "beta" in values else "rm_sample" if "rm" in values else "random_sample"
    if "adapter_path" in values and "save_path" in values:
        return "merge_adapters_to_base"
    found = ", ".join(values) or "nothing"
    raise ConfigError(f"{path}: the keys do not tell which command this is for (found: {found}). Give --kind.")


def _inference(values: dict[str, Any]) -> str:
    first = values["inference_settings"][0] if _is_list_of_objects(values["inference_settings"]) else {}
    model = _section(first, "model_settings")
    if "generator_settings" in model or "retrieval_settings" in model:
        return "inference_rag"
    match _section(values, "dataset_settings").get("dataset_type"):
        case "multimodal":
            return "inference_multimodal"
        case "classification":
            return "inference_classification"
        case "rm" | "pair_preferences" | "sampling":
            return "inference_rm"
        case _ if _scores(model):
            return "inference_rm"
    return "inference_chat"


def _training(values: dict[str, Any]) -> str:
    model = _section(values, "model_settings")
    if "generator_settings" in model or "retrieval_settings" in model:
        return "train_rag"
    arguments = _section(values, "training_arguments") | _section(values, "trainer_settings")
    match _section(values, "train_dataset_settings").get("dataset_type"):
        case "kto":
            return "train_kto"
        case "ddpo":
            return "train_ddpo"
        case "multimodal":
            return "train_multimodal"
        case "classification":
            return "train_classification"
        case "pair_preferences":
            if "rm_settings" in values:
                return "train_ddpo"
            preference = "loss_settings" in arguments or "use_ref_model" in arguments
            return "train_dpo" if preference or not _scores(model) else "train_rm"
        case _ if "modality_encoder_settings_mapping" in values:
            return "train_multimodal"
        case _ if _scores(model):
            return "train_classification"
    return "train_sft"


def _scores(model: dict[str, Any]) -> bool:
    return str(model.get("model_type")).startswith("seq_cls")


def _section(values: dict[str, Any], key: str) -> dict[str, Any]:
    part = values.get(key)
    return part if isinstance(part, dict) else {}


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)

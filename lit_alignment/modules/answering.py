"""The module that answers for a trained model, whatever it was trained by."""

from typing import Any

from lit_alignment.checkpoints.saved import read_model
from lit_alignment.errors import ConfigError
from lit_alignment.modules.generative import GenerativeModule
from lit_alignment.modules.sft import SFTModule
from lit_alignment.modules.vlm import VLMModule


def load_answering(
    source: str, base: str | None = None, device: str = "auto", trust_remote_code: bool = False, **settings: Any
) -> GenerativeModule:
    """A module that answers prompts; arguments are those of `from_checkpoint`.

    Raises:
        ConfigError: If the model answers none, or not from its prompt alone.
    """
    saved = read_model(source, base, trust_remote_code)
    match saved.family:
        case "text":
            return SFTModule.from_saved(saved, source, device, **settings)
        case "media":
            return VLMModule.from_saved(saved, source, device, **settings)
        case "scores":
            of_reward = saved.head is not None and saved.head.labels == ("reward",)
            how = "RewardModule.from_checkpoint(PATH).score([...])" if of_reward else ""
            how = how or "ClassificationModule.from_checkpoint(PATH).classify([...])"
            problem = f"it scores {', '.join(saved.head.labels[:5]) if saved.head else ''} and writes no text"
        case "passages":
            how = "RAGModule.from_checkpoint(PATH, index=IndexConfig(...)).chat(...)"
            problem = "it answers with passages of an index, which the checkpoint does not hold"
        case "vectors":
            how, problem = "RetrieverModule.from_checkpoint(PATH).embed([...])", "it makes vectors and writes no text"
    raise ConfigError(f"{source}: {problem}. Use lit-alignment predict, or in Python lit_alignment.{how}.")

"""The module that answers for a trained model, whatever it was trained by."""

from pathlib import Path

from lit_alignment.checkpoints.saved import read_model
from lit_alignment.errors import ConfigError
from lit_alignment.modules.generative import GenerativeModule
from lit_alignment.modules.rag import RAGModule
from lit_alignment.modules.sft import SFTModule
from lit_alignment.modules.vlm import VLMModule
from lit_alignment.paths import shown
from lit_alignment.retrieval.index import IndexConfig


def load_answering(
    source: str,
    base: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    index: str | None = None,
) -> GenerativeModule:
    """A module that answers prompts; the other arguments are those of `from_checkpoint`.

    Args:
        source: The model.
        base: Its base model.
        device: Where to load it.
        trust_remote_code: Run code that comes with the model.
        index: Folder of the index that a model with retrieved passages answers from.

    Raises:
        ConfigError: If the model answers none, needs an index, or has no use for one.
    """
    saved = read_model(source, base, trust_remote_code)
    if index is not None and saved.family != "passages":
        why = generator_alone(source) or f"this model answers without passages. Leave the index ({index}) out."
        raise ConfigError(f"{source}: {why}")
    match saved.family:
        case "text":
            return SFTModule.from_saved(saved, source, device)
        case "media":
            return VLMModule.from_saved(saved, source, device)
        case "scores":
            of_reward = saved.head is not None and saved.head.labels == ("reward",)
            how = "RewardModule.from_checkpoint(PATH).score([...])" if of_reward else ""
            how = how or "ClassificationModule.from_checkpoint(PATH).classify([...])"
            problem = f"it scores {', '.join(saved.head.labels[:5]) if saved.head else ''} and writes no text"
        case "passages" if index is not None:
            return RAGModule.from_saved(saved, source, device, index=IndexConfig(index))
        case "passages":
            how = "RAGModule.from_checkpoint(PATH, index=IndexConfig(...)).chat(...)"
            problem = (
                "it answers with passages of an index, which the checkpoint does not hold; chat takes --index FOLDER"
            )
        case "vectors":
            how, problem = "RetrieverModule.from_checkpoint(PATH).embed([...])", "it makes vectors and writes no text"
    raise ConfigError(f"{source}: {problem}. Use lit-alignment predict, or in Python lit_alignment.{how}.")


def generator_alone(source: str) -> str:
    """What to say of an export that lies beside its retriever, as it answers without passages; "" of any other model.

    Args:
        source: The model, as it was given.
    """
    folder = Path(source).expanduser().resolve()  # `export` is a link to the folder of the best checkpoint
    if not (folder / "retriever").is_dir():
        return ""
    checkpoint = folder.with_name(f"{folder.name}.ckpt")
    named = f" ({shown(checkpoint)})" if checkpoint.exists() else ""
    return (
        "the generator of a RAG model alone, which answers without passages. From passages its checkpoint answers"
        f"{named}, with --index FOLDER."
    )

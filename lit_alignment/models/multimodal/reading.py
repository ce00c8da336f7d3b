"""Where the media of a composed model meet its data: placeholders, readers, and the cache of features."""

from transformers import PreTrainedTokenizerBase

from lit_alignment.data.multimodal.feature_cache import CacheIndex, FeatureCache
from lit_alignment.data.multimodal.media import FileReader, MediaReader, MediaTokens
from lit_alignment.models.multimodal.modality import MediaShape
from lit_alignment.models.multimodal.vision import encoder_fingerprint


def cache_index(shape: MediaShape, dtype: str = "float32", root: str = "") -> CacheIndex:
    """What a cache of a modality's features says of itself.

    Args:
        shape: The modality.
        dtype: Precision of the features.
        root: Folder that the files' names are relative to.
    """
    encoders = [encoder_fingerprint(encoder) for encoder in shape.modality.encoders]
    return CacheIndex(shape.name, encoders, shape.num_patches, shape.width, dtype, root)


def file_reader(shape: MediaShape) -> FileReader:
    """Reads a modality's files for its encoders."""
    modality = shape.modality
    largest = modality.max_samples if shape.name == "audio" else modality.max_pixels
    return FileReader(shape.name, shape.processors, largest)


def media_tokens(shape: MediaShape, tokenizer: PreTrainedTokenizerBase) -> MediaTokens:
    """What stands for an image, or a sound, in a conversation.

    Args:
        shape: The modality.
        tokenizer: Has its tokens.

    Raises:
        FileNotFoundError: If the modality's cache is not there.
        ConfigError: If another encoder has made that.
    """
    modality = shape.modality
    reader: MediaReader = file_reader(shape)
    if modality.cache is not None:
        reader = FeatureCache(modality.cache, cache_index(shape))
    token = modality.placeholder(shape.name)
    return MediaTokens(
        token=token,
        token_id=int(tokenizer.convert_tokens_to_ids(token)),
        number=shape.number,
        start=modality.start or "",
        end=modality.end or "",
        reader=reader,
    )

"""train_sft: supervised fine-tuning."""

from lit_alignment.tools.convert.document import Document
from lit_alignment.tools.convert.fit import Method, training_document
from lit_alignment.tools.convert.settings import Settings


def convert(top: Settings) -> list[Document]:
    """Our configuration for `fit`."""
    return [training_document(top, Method("SFT", "supervised fine-tuning"))]

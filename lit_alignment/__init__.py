"""Fine-tune and align language models with PyTorch Lightning, with losses that are exact to the token."""

import importlib
from typing import TYPE_CHECKING, Any

from lit_alignment import moved

if TYPE_CHECKING:
    from lit_alignment.callbacks.export import Export
    from lit_alignment.callbacks.predictions import PredictionWriter
    from lit_alignment.callbacks.refresh import IndexRefresh
    from lit_alignment.callbacks.samples.answers import CherryPicks
    from lit_alignment.callbacks.samples.scores import ScoredPicks
    from lit_alignment.callbacks.throughput import Throughput
    from lit_alignment.callbacks.upload import Upload
    from lit_alignment.checkpoints.background import wait_for_saves
    from lit_alignment.checkpoints.io import AsyncCheckpointIO, AtomicCheckpointIO
    from lit_alignment.data.classification import ClassificationDataModule
    from lit_alignment.data.rag import RAGDataModule
    from lit_alignment.data.retriever import PassageDataModule, RetrieverDataModule
    from lit_alignment.data.reward import RewardDataModule
    from lit_alignment.data.sft import SFTDataModule
    from lit_alignment.data.vlm import VLMDataModule
    from lit_alignment.distributed.deepspeed import DeepSpeedStrategy
    from lit_alignment.distributed.fsdp2 import FSDP2Strategy
    from lit_alignment.loggers import ClearMLLogger
    from lit_alignment.modules.classification import ClassificationModule
    from lit_alignment.modules.rag import RAGModule
    from lit_alignment.modules.retriever import RetrieverModule
    from lit_alignment.modules.reward import RewardModule
    from lit_alignment.modules.sft import SFTModule
    from lit_alignment.modules.vlm import VLMModule

__version__ = "0.2.0.dev0"

moved.install()

_PLACES = {
    "AsyncCheckpointIO": "lit_alignment.checkpoints.io",
    "AtomicCheckpointIO": "lit_alignment.checkpoints.io",
    "CherryPicks": "lit_alignment.callbacks.samples.answers",
    "ClassificationDataModule": "lit_alignment.data.classification",
    "ClassificationModule": "lit_alignment.modules.classification",
    "ClearMLLogger": "lit_alignment.loggers",
    "DeepSpeedStrategy": "lit_alignment.distributed.deepspeed",
    "Export": "lit_alignment.callbacks.export",
    "FSDP2Strategy": "lit_alignment.distributed.fsdp2",
    "IndexRefresh": "lit_alignment.callbacks.refresh",
    "PassageDataModule": "lit_alignment.data.retriever",
    "PredictionWriter": "lit_alignment.callbacks.predictions",
    "RAGDataModule": "lit_alignment.data.rag",
    "RAGModule": "lit_alignment.modules.rag",
    "RetrieverDataModule": "lit_alignment.data.retriever",
    "RetrieverModule": "lit_alignment.modules.retriever",
    "RewardDataModule": "lit_alignment.data.reward",
    "RewardModule": "lit_alignment.modules.reward",
    "SFTDataModule": "lit_alignment.data.sft",
    "SFTModule": "lit_alignment.modules.sft",
    "ScoredPicks": "lit_alignment.callbacks.samples.scores",
    "Throughput": "lit_alignment.callbacks.throughput",
    "Upload": "lit_alignment.callbacks.upload",
    "VLMDataModule": "lit_alignment.data.vlm",
    "VLMModule": "lit_alignment.modules.vlm",
    "wait_for_saves": "lit_alignment.checkpoints.background",
}
__all__ = [
    "AsyncCheckpointIO",
    "AtomicCheckpointIO",
    "CherryPicks",
    "ClassificationDataModule",
    "ClassificationModule",
    "ClearMLLogger",
    "DeepSpeedStrategy",
    "Export",
    "FSDP2Strategy",
    "IndexRefresh",
    "PassageDataModule",
    "PredictionWriter",
    "RAGDataModule",
    "RAGModule",
    "RetrieverDataModule",
    "RetrieverModule",
    "RewardDataModule",
    "RewardModule",
    "SFTDataModule",
    "SFTModule",
    "ScoredPicks",
    "Throughput",
    "Upload",
    "VLMDataModule",
    "VLMModule",
    "__version__",
    "wait_for_saves",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `lit-alignment --help` need not wait for torch."""
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'lit_alignment' has no attribute '{name}'")

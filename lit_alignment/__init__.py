"""Fine-tune and align language models with PyTorch Lightning, with losses that are exact to the token."""

import importlib
from typing import TYPE_CHECKING, Any

from lit_alignment import moved

if TYPE_CHECKING:
    from peft import LoraConfig

    from lit_alignment.callbacks.export import Export
    from lit_alignment.callbacks.memory import MemorySnapshot
    from lit_alignment.callbacks.predictions import PredictionWriter
    from lit_alignment.callbacks.refresh import IndexRefresh
    from lit_alignment.callbacks.samples.answers import CherryPicks
    from lit_alignment.callbacks.samples.scores import ScoredPicks
    from lit_alignment.callbacks.throughput import Throughput
    from lit_alignment.callbacks.upload import Upload
    from lit_alignment.checkpoints.background import wait_for_saves
    from lit_alignment.checkpoints.io import AsyncCheckpointIO, AtomicCheckpointIO
    from lit_alignment.data.classification import ClassificationDataModule
    from lit_alignment.data.distillation import DistillationDataModule
    from lit_alignment.data.encoding.encoder import EncodingConfig
    from lit_alignment.data.encoding.templates import TemplateConfig
    from lit_alignment.data.passages import PassageSourceConfig
    from lit_alignment.data.policy import PolicyDataModule
    from lit_alignment.data.preference import PreferenceDataModule
    from lit_alignment.data.rag import RAGDataModule
    from lit_alignment.data.retriever import PassageDataModule, RetrieverDataModule
    from lit_alignment.data.reward import RewardDataModule
    from lit_alignment.data.sft import SFTDataModule
    from lit_alignment.data.sources.records import SourceConfig
    from lit_alignment.data.vlm import VLMDataModule
    from lit_alignment.distributed.deepspeed import DeepSpeedStrategy
    from lit_alignment.distributed.fsdp2 import FSDP2Strategy
    from lit_alignment.generation.settings import DecodingConfig
    from lit_alignment.loggers import ClearMLLogger
    from lit_alignment.losses.distillation_config import DistillationConfig
    from lit_alignment.losses.policy_config import PolicyLossConfig
    from lit_alignment.losses.preference_config import LossConfig
    from lit_alignment.models.adapters import AdapterConfig
    from lit_alignment.models.dual_encoder import RetrieverConfig
    from lit_alignment.models.loading import BackboneConfig
    from lit_alignment.models.multimodal.modality import ModalityConfig
    from lit_alignment.models.reference import ReferenceSyncConfig
    from lit_alignment.models.tokens import NewTokenConfig, TokensConfig
    from lit_alignment.modules.classification import ClassificationModule
    from lit_alignment.modules.distillation import DistillationModule
    from lit_alignment.modules.policy import PolicyModule
    from lit_alignment.modules.preference import PreferenceModule
    from lit_alignment.modules.rag import RAGModule
    from lit_alignment.modules.retriever import RetrieverModule
    from lit_alignment.modules.reward import RewardModule
    from lit_alignment.modules.sft import SFTModule
    from lit_alignment.modules.vlm import VLMModule
    from lit_alignment.optimization import OptimizerConfig
    from lit_alignment.optimizers.muon import MuonWithAdamW
    from lit_alignment.optimizers.schedule_free import ScheduleFreeAdamW
    from lit_alignment.retrieval.index import IndexConfig
    from lit_alignment.rollout.config import RolloutConfig

__version__ = "0.2.0"

moved.install()

_PLACES = {
    "AdapterConfig": "lit_alignment.models.adapters",
    "AsyncCheckpointIO": "lit_alignment.checkpoints.io",
    "AtomicCheckpointIO": "lit_alignment.checkpoints.io",
    "BackboneConfig": "lit_alignment.models.loading",
    "CherryPicks": "lit_alignment.callbacks.samples.answers",
    "ClassificationDataModule": "lit_alignment.data.classification",
    "ClassificationModule": "lit_alignment.modules.classification",
    "ClearMLLogger": "lit_alignment.loggers",
    "DecodingConfig": "lit_alignment.generation.settings",
    "DeepSpeedStrategy": "lit_alignment.distributed.deepspeed",
    "DistillationConfig": "lit_alignment.losses.distillation_config",
    "DistillationDataModule": "lit_alignment.data.distillation",
    "DistillationModule": "lit_alignment.modules.distillation",
    "EncodingConfig": "lit_alignment.data.encoding.encoder",
    "Export": "lit_alignment.callbacks.export",
    "FSDP2Strategy": "lit_alignment.distributed.fsdp2",
    "IndexConfig": "lit_alignment.retrieval.index",
    "IndexRefresh": "lit_alignment.callbacks.refresh",
    "LoraConfig": "peft",
    "LossConfig": "lit_alignment.losses.preference_config",
    "MemorySnapshot": "lit_alignment.callbacks.memory",
    "ModalityConfig": "lit_alignment.models.multimodal.modality",
    "MuonWithAdamW": "lit_alignment.optimizers.muon",
    "NewTokenConfig": "lit_alignment.models.tokens",
    "OptimizerConfig": "lit_alignment.optimization",
    "PassageDataModule": "lit_alignment.data.retriever",
    "PassageSourceConfig": "lit_alignment.data.passages",
    "PolicyDataModule": "lit_alignment.data.policy",
    "PolicyLossConfig": "lit_alignment.losses.policy_config",
    "PolicyModule": "lit_alignment.modules.policy",
    "PreferenceDataModule": "lit_alignment.data.preference",
    "PreferenceModule": "lit_alignment.modules.preference",
    "PredictionWriter": "lit_alignment.callbacks.predictions",
    "RAGDataModule": "lit_alignment.data.rag",
    "RAGModule": "lit_alignment.modules.rag",
    "ReferenceSyncConfig": "lit_alignment.models.reference",
    "RolloutConfig": "lit_alignment.rollout.config",
    "RetrieverConfig": "lit_alignment.models.dual_encoder",
    "RetrieverDataModule": "lit_alignment.data.retriever",
    "RetrieverModule": "lit_alignment.modules.retriever",
    "RewardDataModule": "lit_alignment.data.reward",
    "RewardModule": "lit_alignment.modules.reward",
    "SFTDataModule": "lit_alignment.data.sft",
    "SFTModule": "lit_alignment.modules.sft",
    "ScheduleFreeAdamW": "lit_alignment.optimizers.schedule_free",
    "ScoredPicks": "lit_alignment.callbacks.samples.scores",
    "SourceConfig": "lit_alignment.data.sources.records",
    "TemplateConfig": "lit_alignment.data.encoding.templates",
    "Throughput": "lit_alignment.callbacks.throughput",
    "TokensConfig": "lit_alignment.models.tokens",
    "Upload": "lit_alignment.callbacks.upload",
    "VLMDataModule": "lit_alignment.data.vlm",
    "VLMModule": "lit_alignment.modules.vlm",
    "wait_for_saves": "lit_alignment.checkpoints.background",
}
__all__ = [
    "AdapterConfig",
    "AsyncCheckpointIO",
    "AtomicCheckpointIO",
    "BackboneConfig",
    "CherryPicks",
    "ClassificationDataModule",
    "ClassificationModule",
    "ClearMLLogger",
    "DecodingConfig",
    "DeepSpeedStrategy",
    "DistillationConfig",
    "DistillationDataModule",
    "DistillationModule",
    "EncodingConfig",
    "Export",
    "FSDP2Strategy",
    "IndexConfig",
    "IndexRefresh",
    "LoraConfig",
    "LossConfig",
    "MemorySnapshot",
    "ModalityConfig",
    "MuonWithAdamW",
    "NewTokenConfig",
    "OptimizerConfig",
    "PassageDataModule",
    "PassageSourceConfig",
    "PolicyDataModule",
    "PolicyLossConfig",
    "PolicyModule",
    "PredictionWriter",
    "PreferenceDataModule",
    "PreferenceModule",
    "RAGDataModule",
    "RAGModule",
    "ReferenceSyncConfig",
    "RetrieverConfig",
    "RetrieverDataModule",
    "RetrieverModule",
    "RewardDataModule",
    "RewardModule",
    "RolloutConfig",
    "SFTDataModule",
    "SFTModule",
    "ScheduleFreeAdamW",
    "ScoredPicks",
    "SourceConfig",
    "TemplateConfig",
    "Throughput",
    "TokensConfig",
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

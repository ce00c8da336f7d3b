"""Names of version 0.1 that have moved: they work for one version more, with a warning that tells the new one."""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

ROOT = "lit_alignment."
PACKAGES = ("serving", "strategies")  # folders that are gone
MODULES = {
    "callbacks.checkpoint_io": "checkpoints.io",
    "callbacks.cherry_picks": "callbacks.samples.answers",
    "callbacks.embeddings": "tools.index",
    "callbacks.features": "tools.preprocess",
    "callbacks.picks": "callbacks.samples.base",
    "callbacks.remote": "checkpoints.remote",
    "callbacks.scored_picks": "callbacks.samples.scores",
    "callbacks.tables": "callbacks.samples.loggers",
    "data.cache": "data.sources.cache",
    "data.collate": "data.batching.collate",
    "data.comparisons": "data.encoding.feedback",
    "data.encode": "data.encoding.encoder",
    "data.feature_cache": "data.multimodal.feature_cache",
    "data.features": "tools.preprocess",
    "data.loader": "data.batching.loader",
    "data.media": "data.multimodal.media",
    "data.messages": "data.encoding.messages",
    "data.packing": "data.batching.packing",
    "data.prompts": "data.encoding.prompts",
    "data.records": "data.sources.records",
    "data.report": "data.sources.report",
    "data.responses": "data.encoding.responses",
    "data.rows": "data.encoding.rows",
    "data.sampling": "data.sources.choosing",
    "data.templates": "data.encoding.templates",
    "data.truncation": "data.encoding.truncation",
    "generation.scoring": "evaluation.scoring",
    "generation.vllm_engine": "vllm.engine",
    "metrics.answers": "evaluation.answers",
    "metrics.bleu": "evaluation.bleu",
    "models.llava": "models.multimodal.llava",
    "models.memory": "planning.memory",
    "models.modality": "models.multimodal.modality",
    "models.placing": "models.multimodal.placing",
    "models.projectors": "models.multimodal.projectors",
    "models.restoring": "checkpoints.restore",
    "models.retriever": "models.dual_encoder",
    "models.saving": "checkpoints.hf_folder",
    "models.scaling": "planning.scaling",
    "models.sequence_parallel": "models.collectives",
    "models.sharding": "distributed.sharding",
    "models.tensor_parallel": "distributed.tensor_parallel",
    "models.vision": "models.multimodal.vision",
    "modules.features": "tools.preprocess",
    "modules.media": "models.multimodal.reading",
    "modules.retrieving": "modules.rag",
    "serving.jobs": "vllm.predict",
    "serving.model": "vllm.model",
    "serving.predict": "vllm.predict",
    "serving.repair": "vllm.cpu_repair",
    "serving.torchvision_cpu": "vllm.torchvision_cpu",
    "strategies.deepspeed": "distributed.deepspeed",
    "strategies.fsdp2": "distributed.fsdp2",
    "strategies.save_queue": "checkpoints.background",
    "strategies.sharded": "checkpoints.sharded",
}
NAMES = {
    "Adapter": "AdapterConfig",
    "Backbone": "BackboneConfig",
    "Comparison": "Feedback",
    "GenerationSettings": "DecodingConfig",
    "Head": "HeadConfig",
    "Modality": "ModalityConfig",
    "NewToken": "NewTokenConfig",
    "PassagePlacement": "PassagePlacementConfig",
    "Retriever": "RetrieverConfig",
    "Source": "SourceConfig",
    "read_comparison": "read_feedback",
}
MOVED_NAMES = {  # those that left a module which stays, or which moved elsewhere
    "data.cache.tokenizer_fingerprint": "data.encoding.tokenizer.tokenizer_fingerprint",
    "data.prompts.ItemBatch": "data.batching.items.ItemBatch",
    "data.prompts.PromptBatch": "data.batching.items.PromptBatch",
    "data.reward.SEQUENCE_FEATURES": "data.feedback.RESPONSE_FEATURES",
    "generation.scoring.RewardScorer": "generation.reward_scorer.RewardScorer",
    "generation.settings.Answer": "generation.engine.Completion",
    "generation.settings.FinishReason": "generation.engine.FinishReason",
    "generation.transformers_engine.StopRule": "models.stop_rule.StopRule",
    "generation.transformers_engine.cut_answer": "generation.engine.cut_completion",
    "generation.transformers_engine.generation_config": "models.stop_rule.generation_config",
    "generation.transformers_engine.stop_rule": "models.stop_rule.stop_rule",
    "tools.export.Difference": "checkpoints.comparing.Difference",
    "tools.export.TOLERANCE": "checkpoints.export.TOLERANCE",
    "tools.export.compare": "checkpoints.comparing.compare",
    "tools.export.encode_prompts": "checkpoints.comparing.encode_prompts",
    "tools.export.logits": "checkpoints.comparing.logits",
    "tools.export.reload": "checkpoints.export.reload",
    "tools.export.scores": "checkpoints.comparing.scores",
}


def renamed(module: str, name: str) -> Any:
    """What a name of version 0.1 is now, for `__getattr__` of the module that had it.

    Raises:
        AttributeError: If there never was such a name.
    """
    old = f"{module}.{name}"
    if (moved := MOVED_NAMES.get(old.removeprefix(ROOT))) is not None:
        module, _, new = f"{ROOT}{moved}".rpartition(".")
    elif (new := NAMES.get(name, "")) == "":
        raise AttributeError(f"module '{module}' has no attribute '{name}'")
    _warn(old, f"{module}.{new}")
    return getattr(importlib.import_module(module), new)


class MovedModules(MetaPathFinder, Loader):
    """Finds modules of version 0.1 by their old names, where nothing else has these."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a module that has moved, or None."""
        name = fullname.removeprefix(ROOT)
        if name == fullname or name not in (*PACKAGES, *MODULES):
            return None
        return ModuleSpec(fullname, self, is_package=name in PACKAGES)

    def create_module(self, spec: ModuleSpec) -> None:
        """The usual empty module."""
        return

    def exec_module(self, module: ModuleType) -> None:
        """Let the module hand out what stands under its new name."""
        name = module.__name__.removeprefix(ROOT)
        if name in MODULES:
            new = ROOT + MODULES[name]
            _warn(module.__name__, new)
            module.__getattr__ = _names_of(name, importlib.import_module(new))  # type: ignore[method-assign]


def install() -> None:
    """Let imports find what has moved; asked after every other finder."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())


def _names_of(old: str, new: ModuleType) -> Callable[[str], Any]:
    """`__getattr__` of a module that has moved."""

    def find(name: str) -> Any:
        return renamed(ROOT + old, name) if f"{old}.{name}" in MOVED_NAMES else getattr(new, NAMES.get(name, name))

    return find


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is now {new}; the old name goes with the next version.", FutureWarning, stacklevel=3)

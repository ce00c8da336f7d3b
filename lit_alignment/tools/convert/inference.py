"""inference_chat, inference_rag and inference_multimodal: answers of one or several models."""

from collections.abc import Callable
from typing import Any, Literal

from lit_alignment.tools.convert.chat import encoding, sources
from lit_alignment.tools.convert.document import Document
from lit_alignment.tools.convert.fit import scored_encoding
from lit_alignment.tools.convert.generation import META, PIECES, generation, warn_of_batches
from lit_alignment.tools.convert.model import adapters, backbone
from lit_alignment.tools.convert.multimodal import PICKLED, modalities
from lit_alignment.tools.convert.rag import BUILD, retrieving
from lit_alignment.tools.convert.settings import Settings, shorten

Method = Literal["SFT", "RAG", "VLM"]
PURPOSES = {"SFT": "answers to prompts", "RAG": "answers with passages", "VLM": "answers about images"}
MANY_MODELS = "each model has a configuration of its own here; run them one after the other"
ONE_ANSWER = "with a batch above 1 there was one answer to a prompt there, and no beams; here both are as asked"
FILES = "Files have the old names, single_inference_0.jsonl and so on; a line has `dataset` instead of dataset_name."
OVERWRITTEN = "several models wrote one file there, the last one over the others; here each has a folder of its own"
SCORED = "The file is {file} in output_dir; a line has `dataset` instead of dataset_name."
SCORED_FILES = {"Classification": "classes.jsonl", "Reward": "rewards.jsonl"}
FOLLOWS = "vLLM is told what the adapter needs"


def convert_rag(top: Settings) -> list[Document]:
    """Our configurations for `predict` with retrieval, one a model."""
    return convert(top, "RAG")


def convert_multimodal(top: Settings) -> list[Document]:
    """Our configurations for `predict` with images, one a model."""
    return convert(top, "VLM")


def convert(top: Settings, method: Method = "SFT") -> list[Document]:
    """Our configurations for `predict`, one a model."""
    notes = top.notes
    seed, folder = top.take("seed", 42), top.need("save_path", str)
    for name in ("inference_settings", "dataset_settings"):
        if not top.values.get(name):
            notes.missing.append(name)
    dataset = top.part("dataset_settings")
    found: dict[str, Any] = {"predict": sources(dataset), "encoding": {}} if dataset.values else {}
    if dataset.values:
        found["encoding"] = encoding(dataset, [], prompts=dataset)
    models = top.parts("inference_settings")
    if len(models) > 1:
        notes.warn("inference_settings", MANY_MODELS)

    documents: list[Document] = []
    number = 0  # the old files are numbered through all models
    for old in models:
        named: dict[str, Any] = {}
        batch = old.take("batch", 1)
        for settings in old.parts("generation_settings"):
            named[f"single_inference_{number}"] = _generation(old, settings, seed)
            batch = max(batch, _batch(old, settings, named[f"single_inference_{number}"]))
            number += 1
        if not named:
            notes.missing.append(old.path_of("generation_settings"))
        engine = _engine(old)
        old.leave_out("batch_size prompts are answered at a time", "micro_batch")
        data = found | {"packing": False, "batch_size": batch}
        whole = old.part("model_settings")
        if "model_settings" not in old:
            notes.missing.append(old.path_of("model_settings"))
        model: Settings = whole
        further: dict[str, Any] = {}
        if method == "RAG":
            model, further = _with_passages(whole, folder if len(models) == 1 else f"{folder}/{len(documents)}", data)
        if method == "VLM":
            further = modalities(whole, dataset, [])
            whole.leave_out(PICKLED, "projections_path")
            data["folder"] = "."
        documents.append(_document(old, model, method, {**further, "generation": named}, data, folder, seed, engine))
    return documents


def _generation(old: Settings, settings: Settings, seed: int) -> dict[str, Any]:
    if "transformers_settings" not in settings:
        settings.notes.missing.append(settings.path_of("transformers_settings"))
    answers = settings.part("transformers_settings")
    if old.values.get("use_vllm") is True:
        old.notes.warn(answers.path_of("stop_strings"), PIECES)
    return generation(answers, settings.part("custom_settings")) | {"seed": seed}


def _batch(old: Settings, settings: Settings, ours: dict[str, Any]) -> int:
    custom = settings.part("custom_settings")
    batch = custom.take("batch", 1)
    key = custom.path_of("batch") if batch > 1 else old.path_of("batch")
    batch = max(batch, old.take("batch", 1))
    warn_of_batches(old.notes, key, batch, ours)
    if batch > 1 and old.values.get("use_vllm") is not True:
        if ours.get("num_beams", 1) > 1 or ours.get("num_return_sequences", 1) > 1:
            old.notes.warn(key, ONE_ANSWER)
    return batch


def _engine(old: Settings) -> dict[str, Any]:
    """Our engine, with what vLLM was told."""
    if not old.take("use_vllm", False):
        for key in ("vllm_engine_settings", "tensor_parallel_size"):
            if (value := old.raw(key)) is not None:
                old.notes.leave_out(f"{old.path_of(key)} {shorten(value)}", "use_vllm is off")
        return {}
    old.notes.warn(old.path_of("use_vllm"), META)
    given = old.part("vllm_engine_settings")
    own = {
        "dtype": given.take("dtype", "bfloat16"),
        "tensor_parallel_size": given.take("tensor_parallel_size", old.take("tensor_parallel_size", 1)),
        "gpu_memory_utilization": given.take("gpu_memory_utilization", 0.95),
    }
    if (most := given.maybe("max_logprobs", int)) is not None:
        own["max_logprobs"] = most
    given.leave_out(FOLLOWS, "enable_lora", "max_lora_rank")
    return {"engine": "vllm", "vllm": own}


def scored_documents(
    top: Settings, method: str, purpose: str, module: Callable[[Settings], dict[str, Any]]
) -> list[Document]:
    """Our configurations for `predict` of models that score, one a model.

    Args:
        top: The old configuration.
        method: Of our classes, before Module and DataModule.
        purpose: What the configurations are for.
        module: Further settings of the module for an old model.
    """
    notes = top.notes
    seed, folder = top.take("seed", 42), top.need("save_path", str)
    for name in ("inference_settings", "dataset_settings"):
        if not top.values.get(name):
            notes.missing.append(name)
    dataset = top.part("dataset_settings")
    dataset.leave_out("labels of tokens play no part", "add_labels")
    found: dict[str, Any] = {"predict": sources(dataset), "encoding": {}} if dataset.values else {}
    if dataset.values:
        found["encoding"] = scored_encoding(dataset, [], keep_end=method == "Reward")
    models = top.parts("inference_settings")
    if len(models) > 1:
        notes.warn("inference_settings", MANY_MODELS)
        notes.warn("save_path", OVERWRITTEN)
    documents = []
    for number, old in enumerate(models):
        if "model_settings" not in old:
            notes.missing.append(old.path_of("model_settings"))
        engine = _engine(old)
        old.leave_out("batch_size records are scored at a time", "micro_batch")
        old.leave_out("nothing is generated", "generation_settings")
        model, data = old.part("model_settings"), {"packing": False, "batch_size": old.take("batch", 1)}
        where = folder if len(models) == 1 else f"{folder}/{number}"
        documents.append(
            scored_document(
                model, old.part("tokenizer_settings"), method, purpose, module(model), found | data, where, seed, engine
            )
        )
    return documents


def scored_document(
    model: Settings,
    tokenizer: Settings,
    method: str,
    purpose: str,
    further: dict[str, Any],
    data: dict[str, Any],
    folder: str,
    seed: int,
    engine: dict[str, Any],
) -> Document:
    """Our configuration for `predict` of one model that scores.

    Args:
        model: The old model settings.
        tokenizer: The old tokenizer settings.
        method: Of our classes, before Module and DataModule.
        purpose: What it is for.
        further: Further settings of the module.
        data: Settings of the data module, but for its seed.
        folder: Where its file goes.
        seed: Of everything.
        engine: What computes, where it is not transformers.
    """
    model.leave_out("the tokenizer has its tokens, and nothing is trained", "embeddings_initialization_strategy")
    module = {"backbone": backbone(model, tokenizer, scores=True), **further, **adapters(model, training=False)}
    writer = {"class_path": "lit_alignment.PredictionWriter", "init_args": {"output_dir": folder}}
    config = {
        "seed_everything": seed,
        "trainer": {"default_root_dir": folder, "logger": False, "callbacks": [writer]},
        "model": {"class_path": f"lit_alignment.{method}Module", "init_args": module},
        "data": {"class_path": f"lit_alignment.{method}DataModule", "init_args": {**data, "seed": seed}},
        **engine,
    }
    return Document("predict", purpose, config, [SCORED.format(file=SCORED_FILES[method])])


def _with_passages(whole: Settings, folder: str, data: dict[str, Any]) -> tuple[Settings, dict[str, Any]]:
    """The generator's settings, and ours of retrieval; `data` gets what is the data module's."""
    for name in ("generator_settings", "question_encoder_settings", "index_settings", "retrieval_settings"):
        if name not in whole:
            whole.notes.missing.append(whole.path_of(name))
    retrieval, placement = retrieving(whole, folder, training=False)
    data |= {"query": "dialogue", "placement": placement}
    return whole.part("generator_settings"), retrieval


def _document(
    old: Settings,
    model: Settings,
    method: Method,
    further: dict[str, Any],
    data: dict[str, Any],
    folder: str,
    seed: int,
    engine: dict[str, Any],
) -> Document:
    model.leave_out("the tokenizer has its tokens, and nothing is trained", "embeddings_initialization_strategy")
    module = {
        "backbone": backbone(model, old.part("tokenizer_settings")),
        **adapters(model, training=False),
        **further,
    }
    writer = {"class_path": "lit_alignment.PredictionWriter", "init_args": {"output_dir": folder}}
    config = {
        "seed_everything": seed,
        "trainer": {"default_root_dir": folder, "logger": False, "callbacks": [writer]},
        "model": {"class_path": f"lit_alignment.{method}Module", "init_args": module},
        "data": {"class_path": f"lit_alignment.{method}DataModule", "init_args": {**data, "seed": seed}},
        **engine,
    }
    return Document("predict", PURPOSES[method], config, [FILES, BUILD] if method == "RAG" else [FILES])

"""train_multimodal, preprocess_multimodal_dataset, and what inference_multimodal shares: images and sounds."""

import shlex
from typing import Any

from lit_alignment.tools.convert.document import Document
from lit_alignment.tools.convert.fit import Method, training_document
from lit_alignment.tools.convert.settings import Settings

BGR = "pictures were read with blue in the place of red there; here they are RGB, so a model from there sees otherwise"
CUT = "images of a cut conversation could be taken for each other there; here whole messages go, with their images"
COMPRESS = (
    "the number of embeddings had to be that of the patches there; here c_abstractor makes any square number of them"
)
NUMBER = "it follows from encoder and projector; a wrong number is an error that names the right one"
PICKLE = (
    "features were read there from the first file in the folder of the pictures; here model.{name}.cache names the "
    "file or folder of features, and lit-alignment preprocess makes it"
)
PICKLED = (
    "a pickled file is not loaded; save its projector as safetensors, with the names of ours, and give "
    "projector.weights"
)
ONE_VECTOR = "it could not be loaded there; here it is one vector an image, where its package is installed"
FRAMES = "sounds were one mean vector there, and could not be loaded; here they are up to 64 vectors over time"
READER = "the processor beside the encoder reads files"
STREAMED = (
    "one unreadable picture stopped the run there, and all pictures and features stood in memory; here they stream, in "
    "folders below as well, a killed run goes on, and unreadable files are listed"
)
ALONE = "train_language_model: false trains the projector alone, which there was done by training with no adapter."


def convert(top: Settings) -> list[Document]:
    """Our configuration for `fit`."""
    dataset = top.part("train_dataset_settings")
    others = [top.part("val_dataset_settings"), top.part("cherry_pick_settings").part("dataset_settings")]
    module = modalities(top, dataset, others)
    method = Method("VLM", "a language model that sees images", module=module, data={"folder": "."}, remarks=(ALONE,))
    return [training_document(top, method)]


def modalities(owner: Settings, dataset: Settings, others: list[Settings]) -> dict[str, Any]:
    """Our settings of images and sounds.

    Args:
        owner: Where encoders and projectors stand.
        dataset: The data set whose placeholders hold.
        others: Further data sets.
    """
    notes = owner.notes
    encoders, kinds = owner.part("modality_encoder_settings_mapping"), owner.part("modality_projector_mapping")
    weights, tokens = owner.part("modality_projector_initialization_mapping"), dataset.part("modality_token_mapping")
    start, end = dataset.maybe("start_modality_token", str), dataset.maybe("end_modality_token", str)
    number = dataset.maybe("n_modality_embeddings", int) or owner.maybe("n_modality_embeddings", int)
    owner.leave_out(NUMBER, "n_modality_embeddings")
    for each in (dataset, *others):
        each.leave_out(READER, "modality_reader_settings_mapping")
        each.leave_out(NUMBER, "n_modality_embeddings")
        if each.take("truncate_top", False):
            notes.warn(each.path_of("truncate_top"), CUT)
        if each is not dataset:
            each.leave_out(
                "the placeholders of the training data hold", "modality_token_mapping", "start_modality_token",
                "end_modality_token",
            )  # fmt: skip
    if "modality_encoder_settings_mapping" not in owner:
        notes.missing.append(owner.path_of("modality_encoder_settings_mapping"))
    found: dict[str, Any] = {}
    for name in ("image", "audio"):
        if encoders.raw(name) is None:
            for part in (kinds, weights, tokens):
                part.raw(name)
            continue
        found[name] = _modality(name, encoders.part(name), kinds, number)
        first = weights.maybe(name, str)
        if first is not None:
            if first.endswith(".safetensors"):
                found[name]["projector"]["weights"] = first
            else:
                notes.leave_out(weights.path_of(name), PICKLED)
        marks = {"token": tokens.maybe(name, str), "start": start, "end": end}
        found[name] |= {key: value for key, value in marks.items() if value}
    return found


def _modality(name: str, old: Settings, kinds: Settings, number: int | None) -> dict[str, Any]:
    """Encoder and projector of one modality."""
    notes = old.notes
    kind, path = old.take("modality_encoder_type", "clip"), old.need("encoder_path", str)
    encoder: dict[str, Any] = {"path": path}
    if kind.startswith("imagebind"):
        encoder = {"path": "imagebind"}
        notes.warn(old.path_of("modality_encoder_type"), ONE_VECTOR)
    elif kind == "whisper":
        encoder["layer"] = -1
        notes.warn(old.path_of("modality_encoder_type"), FRAMES)
    elif name == "image":
        notes.warn(old.path, BGR)
    projector: dict[str, Any] = {"kind": "mlp"}
    if kinds.take(name, "llava") == "c_abstractor":
        projector = {"kind": "c_abstractor"} | ({"num_tokens": number} if number else {})
        notes.warn(kinds.path_of(name), COMPRESS)
    if old.take("is_pickle", False):
        notes.warn(old.path_of("is_pickle"), PICKLE.format(name=name))
    return {"encoders": [encoder], "projector": projector}


def convert_preprocess(top: Settings) -> list[Document]:
    """The command that makes a cache of features, as a script."""
    reader, encoder = top.part("reader_settings"), top.part("encoder_settings")
    reader.leave_out(READER, "reader_type", "reader_path")
    kind, path = encoder.take("modality_encoder_type", "clip"), encoder.need("encoder_path", str)
    encoder.leave_out("files are read, not features", "is_pickle")
    if kind.startswith("imagebind"):
        path = "imagebind"
        top.notes.warn(encoder.path_of("modality_encoder_type"), ONE_VECTOR)
    folder, target = top.need("dataset_path", str), top.need("output_file_path", str)
    modality, batch = top.take("modality", "image"), top.take("batch_size", 64)
    command = ["lit-alignment", "preprocess", "--encoder", path, "--files", folder, "--out", target]
    command += ["--modality", modality, "--batch-size", str(batch)]
    top.notes.warn("preprocess_multimodal_dataset", STREAMED)
    return [Document("preprocess", "features of images, made once", shlex.join(command), [])]

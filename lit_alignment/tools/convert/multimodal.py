"""train_multimodal, inference_multimodal and preprocess_multimodal_dataset: images and sounds."""

from typing import Any

from lit_alignment.tools.convert.document import Document, script
from lit_alignment.tools.convert.settings import Extras, Settings

BGR = "pictures were read with blue in the place of red there; here they are RGB, so a model from there sees otherwise"
CUT = "images of a cut conversation could be taken for each other there; here whole messages go, with their images"
COMPRESS = """the number of embeddings had to be that of the patches there; here c_abstractor makes any square number \
of them"""
NUMBER = "it follows from encoder and projector; a wrong number is an error that names the right one"
PICKLE = """features were read there from the first file in the folder of the pictures; here model.{name}.cache names \
the file or folder of features, and lit-alignment preprocess makes it"""
PICKLED = """a pickled file is not loaded; save its projector as safetensors, with the names of ours, and give \
projector.weights"""
ONE_VECTOR = "it could not be loaded there; here it is one vector an image, where its package is installed"
FRAMES = "sounds were one mean vector there, and could not be loaded; here they are up to 64 vectors over time"
MEASURED = "predict writes the answers; lit-alignment evaluate measures them"
READER = "the processor beside the encoder reads files"
STREAMED = """one unreadable picture stopped the run there, and all pictures and features stood in memory; here they \
stream, in folders below as well, a killed run resumes, and unreadable files are listed"""
REMARKS = ("train_language_model: false trains the projector alone, which there was done by training with no adapter.",)
ENCODERS, PROJECTORS = "modality_encoder_settings_mapping", "modality_projector_mapping"
START, END, TOKENS = "start_modality_token", "end_modality_token", "modality_token_mapping"


def media(top: Settings, old: Settings, folder: str) -> Extras:
    """Settings of images and sounds."""
    if old is top:
        train, val = top.part("train_dataset_settings"), top.part("val_dataset_settings")
        return _modalities(top, train, [val, top.part("cherry_pick_settings.dataset_settings")]), {"folder": "."}
    model = old.part("model_settings")
    model.leave_out(NUMBER, "n_modality_embeddings")
    # Encoders and projectors stand beside the model's settings, in some files among them.
    module = _modalities(old if ENCODERS in old else model, top.part("dataset_settings"), [])
    model.leave_out(PICKLED, "projections_path")
    old.leave_out(MEASURED, "metric_settings")
    return module, {"folder": "."}


def _modalities(owner: Settings, dataset: Settings, others: list[Settings]) -> dict[str, Any]:
    """Our settings of images and sounds; `owner` has encoders and projectors, `dataset` the placeholders that hold."""
    owner.require(ENCODERS)
    number = dataset.maybe("n_modality_embeddings", int) or owner.maybe("n_modality_embeddings", int)
    for each in (dataset, *others):
        each.leave_out(READER, "modality_reader_settings_mapping")
        each.leave_out(NUMBER, "n_modality_embeddings")
        each.warn(CUT, "truncate_top", when=each.take("truncate_top", False))
        held = "the placeholders of the training data hold"
        each.leave_out(held, TOKENS, START, END, when=each is not dataset)
    found: dict[str, Any] = {}
    for name in ("image", "audio"):
        marks = {"token": f"{TOKENS}.{name}", "start": START, "end": END}
        placeholders = {ours: value for ours, key in marks.items() if (value := dataset.maybe(key, str))}
        weights = owner.maybe(f"modality_projector_initialization_mapping.{name}", str)
        kind = owner.take(f"{PROJECTORS}.{name}", "llava")
        if owner.raw(f"{ENCODERS}.{name}") is None:
            continue
        encoder = _encoder(owner.part(f"{ENCODERS}.{name}"), name)
        projector: dict[str, Any] = {"kind": "mlp"}
        if kind == "c_abstractor":
            projector = {"kind": kind} | ({"num_tokens": number} if number else {})
            owner.warn(COMPRESS, f"{PROJECTORS}.{name}")
        pickled = f"{ENCODERS}.{name}.is_pickle"
        owner.warn(PICKLE.format(name=name), pickled, when=owner.take(pickled, False))
        if weights is not None and weights.endswith(".safetensors"):
            projector["weights"] = weights
        elif weights is not None:
            owner.leave_out(PICKLED, f"modality_projector_initialization_mapping.{name}")
        found[name] = {"encoders": [encoder], "projector": projector, **placeholders}
    return found


def _encoder(old: Settings, name: str) -> dict[str, Any]:
    kind, path = old.take("modality_encoder_type", "clip"), old.need("encoder_path")
    if kind.startswith("imagebind"):
        old.warn(ONE_VECTOR, "modality_encoder_type")
        return {"path": "imagebind"}
    if kind == "whisper":
        old.warn(FRAMES, "modality_encoder_type")
        return {"path": path, "layer": -1}
    if name == "image":
        old.warn(BGR)
    return {"path": path}


def convert_preprocess(top: Settings) -> list[Document]:
    """The command that makes a cache of features, as a script."""
    top.leave_out(READER, "reader", "reader_settings.reader_type", "reader_settings.reader_path")
    old = top.part("encoder_settings")
    old.leave_out("files are read, not features", "is_pickle")
    command = ["preprocess", "--encoder", _encoder(old, "")["path"]]
    command += ["--files", top.need("dataset_path"), "--out", top.need("output_file_path")]
    command += ["--modality", top.take("modality", "image"), "--batch-size", str(top.take("batch_size", 64))]
    top.warn(STREAMED, "preprocess_multimodal_dataset")
    return [script("features of images, made once", *command)]

"""train_rag, and what inference_rag shares with it: a retriever and a generator."""

from typing import Any

from lit_alignment.tools.convert.document import Document
from lit_alignment.tools.convert.fit import Method, training_document
from lit_alignment.tools.convert.settings import Settings

LEAK = (
    "the query is the dialogue up to the answer; there the answer itself stood in it, so that the retriever was asked "
    "with what it should find"
)
ONE = (
    "with one passage the retriever got no gradient there, nor would it here, so train_retriever is none; to train it, "
    "set num_passages to 2 or more, train_retriever to query, and retriever.towers to separate"
)
SEVERAL = (
    "all passages stand in one prompt; there it crashed with several. model.decoding has the ways that weigh the "
    "answers of each passage"
)
SHIFT = (
    "the loss there asked each token for itself instead of the next one; here the answer is predicted, so nothing that "
    "was trained there compares"
)
TEMPERATURE = (
    "scores are divided by retriever.temperature, 0.01; cosines without one, as there, make all passages nearly equal"
)
PLACE = "passages stand in the last user message, with `placement`; there they stood before the beginning-of-text token"
REBUILT = "the index is built from the passages with the encoder itself, since nothing in the old one says what made it"
FOLLOWS = "it follows from the encoder"
SEARCHED = "all queries of a batch are searched at once"
BUILD = "Build the index first: lit-alignment index build --config FILE."


def convert(top: Settings) -> list[Document]:
    """Our configuration for `fit`."""
    model = top.part("model_settings")
    for name in ("generator_settings", "question_encoder_settings", "index_settings", "retrieval_settings"):
        if name not in model:
            top.notes.missing.append(model.path_of(name))
    module, placement = retrieving(model, top.take("log_path", "train_output"), training=True)
    method = Method(
        "RAG",
        "a retriever and a generator",
        module={**module, "objective": "rag_sequence"},
        data={"query": "dialogue", "placement": placement},
        remarks=(BUILD,),
    )
    top.notes.warn("model_settings", SHIFT)
    return [training_document(top, method, model.part("generator_settings"))]


def retrieving(model: Settings, folder: str, training: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our settings of retriever and index, and of how passages stand in a conversation.

    Args:
        model: The old `model_settings`.
        folder: The run's folder, in which the index is put.
        training: Whether something learns.
    """
    asked, old = model.part("question_encoder_settings"), model.part("retrieval_settings")
    index = model.part("index_settings")
    asked.take("model_type", "encoder")
    number, prefix = old.take("n_docs", 1), old.take("prefix", "")
    retriever: dict[str, Any] = {
        "path": asked.need("model_path", str),
        "query_max_length": old.take("query_encoder_max_length", 512),
    }
    if prefix:
        retriever["query_prefix"] = f"{prefix} "
        if prefix.strip().lower() == "query:":  # e5, whose passages have a prefix of their own
            retriever["passage_prefix"] = "passage: "
    learns = training and number > 1
    if learns:
        retriever["towers"] = "separate"
    module: dict[str, Any] = {
        "retriever": retriever,
        "index": {"path": f"{folder}/index", "passages": [{"path": index.need("passages_path", str)}]},
        "num_passages": number,
        "train_retriever": "query" if learns else "none",
    }
    if training:
        rate = old.maybe("encoder_learning_rate", float)
        if rate is not None:
            module["retriever_learning_rate"] = rate
    else:
        old.leave_out("nothing is trained", "encoder_learning_rate")
        module["decoding"] = "concatenate"
    index.leave_out(REBUILT, "index_path")
    old.leave_out(FOLLOWS, "retrieval_vector_size")
    old.leave_out(SEARCHED, "retrieval_batch_size")
    notes = model.notes
    if number == 1 and training:
        notes.warn(old.path_of("n_docs"), ONE)
    if number > 1 and not training:
        notes.warn(old.path_of("n_docs"), SEVERAL)
    notes.warn(f"{old.path} -> data.query", LEAK)
    notes.warn(f"{old.path} -> model.retriever.temperature", TEMPERATURE)
    notes.warn(f"{old.path} -> data.placement", PLACE)
    placement = {
        "passage": f"{{title}}{old.take('title_sep', ' / ')}{{text}}",
        "separator": old.take("doc_sep", " // "),
        "max_tokens": old.take("max_doc_length", 300),
    }
    return module, placement

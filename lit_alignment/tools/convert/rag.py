"""train_rag and inference_rag: a retriever and a generator."""

from typing import Any

from lit_alignment.tools.convert.settings import Extras, Row, Settings, Table, carry

LEAK = """the query is the dialogue up to the answer; there the answer itself stood in it, so that the retriever was \
asked with what it should find"""
ONE = """with one passage the retriever got no gradient there, nor would it here, so train_retriever is none; to train \
it, set num_passages to 2 or more, train_retriever to query, and retriever.towers to separate"""
SEVERAL = """all passages stand in one prompt; there it crashed with several. model.decoding has the ways that weigh \
the answers of each passage"""
SHIFT = """the loss there asked each token for itself instead of the next one; here the answer is predicted, so \
nothing that was trained there compares"""
TEMPERATURE = """scores are divided by retriever.temperature, 0.01; cosines without one, as there, make all passages \
nearly equal"""
PLACE = "passages stand in the last user message, with `placement`; there they stood before the beginning-of-text token"
REBUILT = "the index is built from the passages with the encoder itself, since nothing in the old one says what made it"
FOLLOWS = "it follows from the encoder"
SEARCHED = "all queries of a batch are searched at once"
REMARKS = ("Build the index first: lit-alignment index build --config FILE.",)
GENERATOR = "model_settings.generator_settings"
PARTS = ("generator_settings", "question_encoder_settings", "index_settings", "retrieval_settings")
PLACEMENT: Table = {
    "title_sep": Row(" / ", "passage", make=lambda between: f"{{title}}{between}{{text}}"),
    "doc_sep": Row(" // ", "separator"),
    "max_doc_length": Row(300, "max_tokens"),
    "retrieval_vector_size": FOLLOWS,
    "retrieval_batch_size": SEARCHED,
}


def retrieval(top: Settings, old: Settings, folder: str) -> Extras:
    """Settings of the retriever and of its index in the run's folder, and of how passages stand in a prompt."""
    training, model = old is top, old.part("model_settings")
    model.require(*PARTS)
    asked, index, old = (model.part(name) for name in PARTS[1:])
    asked.take("model_type", "encoder")
    number, prefix = old.take("n_docs", 1), old.take("prefix", "")
    retriever = {"path": asked.need("model_path"), "query_max_length": old.take("query_encoder_max_length", 512)}
    if prefix:
        retriever["query_prefix"] = f"{prefix} "
    if prefix.strip().lower() == "query:":  # e5, whose passages have a prefix of their own
        retriever["passage_prefix"] = "passage: "
    if learns := training and number > 1:
        retriever["towers"] = "separate"
    module: dict[str, Any] = {
        "retriever": retriever,
        "index": {"path": f"{folder}/index", "passages": [{"path": index.need("passages_path")}]},
        "num_passages": number,
        "train_retriever": "query" if learns else "none",
    }
    old.leave_out("nothing is trained", "encoder_learning_rate", when=not training)
    if training:
        module |= {
            **carry(old, {"encoder_learning_rate": Row(float, "retriever_learning_rate")}),
            "objective": "rag_sequence",
        }
    else:
        module["decoding"] = "concatenate"
    index.leave_out(REBUILT, "index_path")
    old.warn(ONE, "n_docs", when=training and number == 1)
    old.warn(SEVERAL, "n_docs", when=not training and number > 1)
    for text, ours in ((LEAK, "data.query"), (TEMPERATURE, "model.retriever.temperature"), (PLACE, "data.placement")):
        old.warn(text, ours=ours)
    top.warn(SHIFT, "model_settings", when=training)
    return module, {"query": "dialogue", "placement": carry(old, PLACEMENT)}

"""Passages by our index, answers by vLLM."""

import pytest

from lit_alignment.errors import ConfigError
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.modules.rag import RAGModule
from tests.helpers import RETRIEVER, chats, encoded_index, knowledge, rag_data
from tests.vllm.helpers import FAST, by_transformers, by_vllm, lines, same_answers, trained

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
GREEDY = {"greedy": DecodingConfig(max_new_tokens=8, logprobs=True)}


@pytest.mark.parametrize("decoding", ["concatenate", "rag_sequence_fast"])
def test_answers_with_passages_are_those_of_transformers(tmp_path, base, decoding):
    index = encoded_index(tmp_path, knowledge(12))

    def module():
        settings = {"num_passages": 2, "decoding": decoding, "train_retriever": "query", "generation": GREEDY}
        return RAGModule(BackboneConfig(base), retriever=RETRIEVER, index=index, optimizer=FAST, **settings)

    checkpoint = trained(tmp_path, first := module(), rag_data(first, chats(6), chats(4)), steps=4)
    runs = []
    for run in (by_transformers, by_vllm):
        runs.append(lines(run(tmp_path, each := module(), rag_data(each, None, chats(4)), checkpoint), "greedy"))
    for one, other in zip(*runs, strict=True):
        assert one["documents"] == other["documents"]
        assert one["doc_scores"] == pytest.approx(other["doc_scores"], abs=1e-4)
    same_answers(*runs)


def test_decoding_that_needs_the_generator_itself_is_refused(tmp_path, base):
    index = encoded_index(tmp_path, knowledge(6))
    module = RAGModule(BackboneConfig(base), retriever=RETRIEVER, index=index, decoding="rag_token")
    with pytest.raises(ConfigError, match="use rag_sequence_fast or concatenate"):
        by_vllm(tmp_path, module, rag_data(module, None, chats(2)))

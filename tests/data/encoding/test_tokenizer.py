"""Boundaries that no token reaches over, under the tokenizers that models have."""

import re

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_alignment.data.encoding.tokenizer import TextTokenizer


def byte_pairs():
    """A tokenizer of bytes, which merges a white space with the word behind it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("\u0120", "b"), ("a", "b"), ("\u010a", "\u010a")]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def sentence_pieces():
    """A tokenizer that writes a mark where words begin, and one at the beginning of each text."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [
        ("<unk>", 0.0),
        ("\u2581", -3.0),
        *((letter, -4.0) for letter in letters),
        ("\u2581b", -2.0),
        ("ab", -1.0),
    ]
    backend = Tokenizer(models.Unigram(pieces, 0))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    return backend


@pytest.fixture(params=[byte_pairs, sentence_pieces])
def tokenizer(request):
    """With BOS, an end of turn, and a header that swallows the white space behind it, as Phi-3's."""
    loaded = PreTrainedTokenizerFast(tokenizer_object=request.param(), bos_token="<s>", eos_token="</s>")
    loaded.add_tokens([AddedToken("<|end|>", special=True), AddedToken("<|bot|>", special=True, rstrip=True)])
    return loaded


@pytest.mark.parametrize(
    ("before", "behind"),
    [
        ("<s>a", "b"),
        ("<s>a ", "b c"),
        ("<s>a", " b"),
        ("<s>x\n", "\nb"),
        ("<s>a<|end|>", "b"),
        ("<s>a<|bot|>\n", "b"),
        ("<s>a<|bot|>", "\nb"),
        ("<s>a<|bot|>\n", "\nb"),
        ("a ab", "<|end|>"),
        ("<s>\u00e9", "\u00e9b"),
    ],
)
def test_ids_before_a_boundary_are_those_of_that_text_alone(before, behind, tokenizer):
    tokenize = TextTokenizer(tokenizer)
    alone, whole = tokenize(before, []), tokenize(before + behind, [len(before)])
    plain = tokenizer(before + behind, add_special_tokens=False)["input_ids"]
    assert whole.ids[: len(alone.ids)] == alone.ids
    assert whole.begin(len(before)) == len(alone.ids) == whole.end(len(before))
    assert whole.splits == int(whole.ids != plain)
    words = [re.sub(r"\s|<unk>", "", tokenizer.decode(ids)) for ids in (whole.ids, plain)]
    assert words[0] == words[1]


def test_special_token_stays_whole_beside_a_boundary(tokenizer):
    tokens = TextTokenizer(tokenizer)("<s>ab<|end|>ab", [3, 5, 12])
    assert [tokenizer.decode([index]) for index in tokens.ids] == ["<s>", "ab", "<|end|>", "ab"] and tokens.splits == 0


def test_doubled_bos_is_one_and_places_follow(tokenizer):
    tokens = TextTokenizer(tokenizer)("<s><s>ab", [6])
    assert tokenizer.decode(tokens.ids) == "<s>ab" and tokens.begin(6) == 1 and tokens.place(1) == (6, 8)

"""Text cut into passages, with values worked by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_alignment.data.sources.text_passages import num_words, split_text


def pieces(text, max_words=100, markdown=False):
    return [(each.heading, each.text, each.line) for each in split_text(text.splitlines(), max_words, markdown)]


def test_markdown_is_cut_at_its_headings():
    text = "\n".join(
        [
            "before",
            "",
            "# Guide #",
            "## Install",
            "Run it.",
            "```sh",
            "# no heading",
            "",
            "make",
            "```",
            "",
            "Then wait.",
            "### Linux",
            "",
            "Setext",
            "------",
            "fine",
            "#hashtag",
            "",
            "# Empty",
        ]
    )
    assert pieces(text, markdown=True) == [
        ("", "before", 1),
        ("Guide > Install", "Run it.\n```sh\n# no heading\n\nmake\n```\n\nThen wait.", 5),
        ("Guide > Setext", "fine\n#hashtag", 17),
    ]


def test_titles_that_are_underlined_are_headings_ranked_in_the_order_of_their_styles():
    text = "===\nTop\n===\nIntro.\n\nPart\n****\n\nOne.\n\nInner\n-----\nTwo.\n\nOther part\n**********\nThree."
    assert pieces(text) == [
        ("Top", "Intro.", 4),
        ("Top > Part", "One.", 9),
        ("Top > Part > Inner", "Two.", 13),
        ("Top > Other part", "Three.", 17),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "A      B\n--------\n1      2",  # a table
        "=====  =====\nA      B\n=====  =====",
        "| a |\n-----",
        "- item\n------\nrest",
        "Too long for it\n---",
        "two lines\nof text\n-------",
        "---\ntitle: mine\ntags: a\n---",
    ],
)
def test_what_only_looks_like_a_title_is_text(text):
    assert pieces(text) == [("", text, 1)]


def test_front_matter_is_no_heading():
    assert pieces("---\ntitle: x\n---\n\ntext", markdown=True) == [("", "---\ntitle: x\n---\n\ntext", 1)]


def test_paragraphs_stand_together_as_long_as_they_fit():
    assert pieces("a b c\n\nd e\n\n----\n\nf g\n\nh", max_words=5) == [("", "a b c\n\nd e", 1), ("", "f g\n\nh", 7)]
    assert pieces("# A\na\n# B\nb", max_words=5, markdown=True) == [("A", "a", 2), ("B", "b", 4)]  # not over a heading


def test_long_paragraph_is_cut_between_its_sentences_into_equal_parts():
    text = "See Dr. No, e.g. Here. It (all) ends.\nWhy not? Because of it."
    assert pieces(text, max_words=6) == [
        ("", "See Dr. No, e.g. Here.", 1),
        ("", "It (all) ends.\nWhy not?", 1),
        ("", "Because of it.", 2),
    ]


def test_sentence_that_is_too_long_is_cut_between_lines_and_a_line_between_words():
    assert pieces("- a b\n- c d\n- e f", max_words=6) == [("", "- a b\n- c d", 1), ("", "- e f", 3)]
    assert [text for _, text, _ in pieces("a b c d e", max_words=2)] == ["a b", "c d", "e"]


def test_text_without_spaces_is_counted_and_cut_too():
    sentence = "\u4eca\u65e5\u306f\u6674\u308c\u3002"
    assert num_words(sentence) == 6 and num_words("x" * 81) == 3
    assert [text for _, text, _ in pieces(sentence * 3, max_words=12)] == [sentence * 2, sentence]


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="aB.!?\n #-=`*|\u3042\u3002", max_size=200), st.integers(1, 9), st.booleans())
def test_no_passage_is_too_long_and_no_text_is_lost(text, max_words, markdown):
    found = list(split_text(text.split("\n"), max_words, markdown))
    assert all(0 < num_words(each.text) <= max_words for each in found if num_words(each.text))
    kept = "".join(each.heading + each.text for each in found)
    for letter in "aB\u3042":  # headings with nothing below them are left out, and one stands over several passages
        if "#" not in text and not any(set(line.strip()) <= set("#-=`*|!.?") for line in text.split("\n") if line):
            assert kept.count(letter) == text.count(letter)
    lines = text.split("\n")
    for each in found:
        assert each.text.split("\n")[0].strip() in lines[each.line - 1]

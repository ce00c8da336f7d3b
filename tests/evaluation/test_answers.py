"""Metrics of answers, with their numbers worked by hand."""

import math

import pytest
import torch
from torchmetrics.functional.text.rouge import rouge_score

from lit_alignment.errors import ConfigError
from lit_alignment.evaluation.answers import (
    MODEL_METRICS,
    ROUGE,
    TEXT_METRICS,
    Answered,
    Distinct,
    Diversity,
    ExactMatch,
    KLToBase,
    Length,
    Perplexity,
    RetrievalUtility,
    Reward,
    SelfBLEU,
    build_metric,
)


def computed(metric, *items):
    for item in items:
        metric.update(item)
    return metric.compute()


def test_exact_match_is_a_mean_over_prompts_with_a_reference():
    items = [Answered(["a ", "b"], "a"), Answered(["x"], "x"), Answered(["anything"], None)]
    assert computed(ExactMatch(), *items) == {"exact_match": 0.75}  # (1/2 + 1) / 2; the third does not count


def test_nothing_to_compare_gives_no_value():
    assert computed(ExactMatch(), Answered(["a"], None)) == {}
    assert computed(Perplexity()) == {}


def test_length_counts_words_characters_and_tokens_where_known():
    found = computed(Length(), Answered(["one two", "three"], num_tokens=[4, 2]), Answered(["a b c d"]))
    assert found == {"length_tokens": 3.0, "length_words": (1.5 + 4) / 2, "length_characters": (6 + 7) / 2}


def test_answers_may_differ_in_number_and_be_empty():
    items = [Answered(["", "a"], ""), Answered([""], "a"), Answered(["a", "a", "b"], "a")]
    assert computed(ExactMatch(), *items)["exact_match"] == pytest.approx((1 / 2 + 0 + 2 / 3) / 3)
    assert computed(ROUGE(), Answered([""], "a"))["rouge1_fmeasure"] == 0.0
    assert computed(Distinct(1), items[1]) == {} and computed(SelfBLEU(1), Answered(["", ""])) == {"self_bleu": 0.0}
    # a | a b: 1, a | a b: 1, b | a a: 0
    assert computed(SelfBLEU(1), items[2])["self_bleu"] == pytest.approx(2 / 3)


def test_distinct_pools_the_answers_of_a_prompt():
    """Unigrams a b a b c: 3 of 5; bigrams ab ba | bc: 3 of 3."""
    found = computed(Distinct(2), Answered(["a b a", "b c"]))
    assert found == {"distinct_1": 3 / 5, "distinct_2": 1.0}
    assert computed(Distinct(3), Answered(["a b"])) == {"distinct_1": 1.0, "distinct_2": 1.0}


def test_adjusted_distinct_does_not_fall_with_length_alone():
    """Words drawn evenly from 50: the plain form falls from 0.6 to 0.1, the adjusted one stays near 1."""
    generator = torch.Generator().manual_seed(0)
    texts = [" ".join(map(str, torch.randint(50, (n,), generator=generator).tolist())) for n in (50, 500)]
    short, long = (computed(Distinct(1, vocabulary=50), Answered([text])) for text in texts)
    assert short["distinct_1"] > 0.5 and long["distinct_1"] < 0.11
    assert short["ead_1"] == pytest.approx(1, abs=0.1) and long["ead_1"] == pytest.approx(1, abs=0.01)
    by_hand = short["distinct_1"] * 50 / (50 * (1 - (49 / 50) ** 50))
    assert short["ead_1"] == pytest.approx(by_hand)


def test_diversity_is_the_entropy_of_the_words():
    found = computed(Diversity(), Answered(["a a b b", "c c c"]))
    assert found["diversity"] == pytest.approx(math.log(2) / 2)
    top = computed(Diversity(top_k=2), Answered(["a a a b c"]))
    assert top["diversity"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert computed(Diversity(), Answered([""])) == {}


def test_self_bleu_compares_words_and_needs_two_answers():
    assert computed(SelfBLEU(2), Answered(["a b c d"] * 3))["self_bleu"] == pytest.approx(1.0)
    # Words that share letters only are not alike.
    assert computed(SelfBLEU(2), Answered(["abc", "bca"]))["self_bleu"] == 0.0
    assert computed(SelfBLEU(2), Answered(["only one"])) == {}


def test_rouge_by_hand():
    """`the cat` against `the cat sat`: all of 2 words right, 2 of 3 found; 1 pair of 1 and of 2."""
    found = computed(ROUGE(), Answered(["the cat"], "the cat sat"))
    assert found["rouge1_precision"] == 1 and found["rouge1_recall"] == pytest.approx(2 / 3)
    assert found["rouge1_fmeasure"] == pytest.approx(0.8) and found["rouge2_recall"] == pytest.approx(1 / 2)
    assert found["rougeL_fmeasure"] == pytest.approx(0.8)


def test_rouge_reads_every_script_and_english_as_torchmetrics_does():
    found = computed(ROUGE(), Answered(["Кошка спит."], "кошка сидит"))
    assert found["rouge1_fmeasure"] == pytest.approx(0.5)
    answer, reference = "It's a small_cat -- 3 mats, OK?", "it s the Small cat; 3 mats!"
    expected = rouge_score(answer, reference, rouge_keys=ROUGE.KEYS)
    assert computed(ROUGE(), Answered([answer], reference)) == pytest.approx({k: float(v) for k, v in expected.items()})


def test_perplexity_weighs_tokens_not_prompts():
    """Five tokens in three answers of two prompts: (1 + 2 + 3 + 6 + 8) / 5 = 4."""
    items = [Answered(["a", ""], logps=[[-1.0, -2.0, -3.0, -6.0], []]), Answered(["b"], logps=[[-8.0]])]
    assert computed(Perplexity(), *items)["perplexity"] == pytest.approx(math.exp(4.0))


def test_kl_is_the_mean_difference_of_the_tokens():
    item = Answered(["a"], logps=[[-1.0, -0.5]], base_logps=[[-2.0, -0.25]])
    assert computed(KLToBase(), item)["kl"] == pytest.approx(0.375)
    assert computed(KLToBase(), Answered(["a"], logps=[[-1.0]])) == {}


def test_kl_is_a_mean_over_the_tokens_of_all_prompts():
    """One token that moved by 2, and seven that did not: 2 / 8, and not the mean of 2 and 0."""
    metric = KLToBase()
    metric.update(Answered(["a"], logps=[[-1.0]], base_logps=[[-3.0]]))
    metric.update(Answered(["b"], logps=[[-1.0] * 7], base_logps=[[-1.0] * 7]))
    assert metric.means() == {"kl": pytest.approx(0.25)}


def test_reward_means_and_best():
    assert computed(Reward(), Answered(["a", "b"], rewards=[1.0, 3.0])) == {"reward": 2.0, "reward_best": 3.0}


def test_retrieval_utility_has_a_column_a_document_and_one_for_all():
    item = Answered(["a", "b"], document_utilities=[[0.5, 0.1, 0.7], [0.3, 0.1, 0.5]])
    found = computed(RetrievalUtility(), item)
    assert found == pytest.approx(
        {"retrieval_utility_all": 0.6, "retrieval_utility_1": 0.4, "retrieval_utility_2": 0.1}
    )


@pytest.mark.parametrize("name", [*TEXT_METRICS, *MODEL_METRICS])
def test_parts_added_up_equal_the_whole(name):
    """What ranks and resets rely on: sums of two halves give the value of all prompts."""
    items = [
        Answered(["a b", "a c"], "a b", [3, 3], [[-1.0, -2.0], [-5.0]], [[-1.5, -2.0], [-1.0]], [0.5, 1.0], [[1, 2]]),
        Answered(["x", "x y"], "x", [1, 2], [[-0.1], [-3.0, -1.0]], [[-0.2], [-3.0, -2.0]], [2.0, -1.0], [[0.0, 1.0]]),
        Answered(["q r s t"], None, [4], [[-0.3]], [[-0.1]], [0.0]),
    ]  # fmt: skip
    whole, first, second = (build_metric(name) for _ in range(3))
    expected = computed(whole, *items)
    first.update(items[0])
    for item in items[1:]:
        second.update(item)
    first.totals += second.totals
    first.counts += second.counts
    assert first.compute() == pytest.approx(expected) and expected


def test_impossible_orders_and_vocabularies_are_refused():
    for name in ("distinct", "self_bleu"):
        with pytest.raises(ConfigError, match="ngram is 0; use 1 or more"):
            build_metric(name, ngram=0)
    with pytest.raises(ConfigError, match="vocabulary is 1; use 2 or more"):
        build_metric("distinct", vocabulary=1)


def test_unknown_metric_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown metric 'exactmatch'. Did you mean 'exact_match'?"):
        build_metric("exactmatch")

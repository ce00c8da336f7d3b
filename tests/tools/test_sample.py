"""Choosing among scored answers: what is chosen, how often, and what is written."""

import json
import math
import random
from collections import Counter

import pytest

from lit_alignment.data.encoding.feedback import read_feedback
from lit_alignment.data.encoding.messages import read_record
from lit_alignment.errors import ConfigError, RecordError
from lit_alignment.tools.sample import best_of_n, main, rejection_sample, worst_of_n
from tests.helpers import write_jsonl
from tests.helpers.commands import command

ASK = [{"role": "user", "content": "q"}]
LINE = {
    "id": "a", "dataset": "d", "messages": ASK, "label": "l", "meta": {"m": 1},
    "answers": [{"id": "0", "content": "x"}, {"id": "1", "content": "y", "num_tokens": 3}, {"id": "2", "content": "z"}],
    "rewards": {"0": 1.0, "1": 3.0, "2": -0.5},
}  # fmt: skip


def run(folder, lines, *options):
    source = write_jsonl(folder / "rewards.jsonl", lines)
    main([source, "--out", str(folder / "out.jsonl"), "--overwrite", *options])
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_best_and_worst_keep_the_order_of_equal_rewards():
    rewards = [1.0, 3.0, 3.0, -1.0]
    assert best_of_n(rewards, 3) == [1, 2, 0] and worst_of_n(rewards, 2) == [3, 0]


def test_rejection_sampling_accepts_as_many_different_answers_as_asked_for():
    generator = random.Random(0)
    for _ in range(2000):
        rewards = [generator.gauss(0, 1) for _ in range(16)]
        accepted = rejection_sample(rewards, 8, 0.5, generator)
        assert len(accepted) == len(set(accepted)) == 8
    assert sorted(rejection_sample([1.0, 2.0], 5, 0.5, generator)) == [0, 1]  # fewer than asked for: all


def first_accepted(rewards, beta):
    """Chance of each answer to be the first accepted one, by going through every order and every outcome.

    The best one is accepted for certain, so the first is found in the first round.
    """
    from itertools import permutations

    accept = [math.exp((reward - max(rewards)) / beta) for reward in rewards]
    chances = [0.0] * len(rewards)
    orders = list(permutations(range(len(rewards))))
    for order in orders:
        left = 1.0
        for place in order:
            chances[place] += left * accept[place] / len(orders)
            left *= 1 - accept[place]
    return chances


def test_first_accepted_answer_has_the_frequency_of_a_brute_force_enumeration():
    rewards, beta, trials = [0.0, 0.5, 1.0, -1.0], 0.7, 20_000
    generator = random.Random(1)
    found = Counter(rejection_sample(rewards, 1, beta, generator)[0] for _ in range(trials))
    for place, chance in enumerate(first_accepted(rewards, beta)):
        error = math.sqrt(chance * (1 - chance) / trials)
        assert abs(found[place] / trials - chance) < 4 * error


def test_beta_goes_from_the_best_to_an_even_choice():
    rewards = [0.0, 3.0, 1.0, 2.0]
    generator = random.Random(2)
    assert all(rejection_sample(rewards, 3, 1e-3, generator) == [1, 3, 2] for _ in range(50))
    found = Counter(rejection_sample(rewards, 1, 1e6, generator)[0] for _ in range(8000))
    assert all(abs(found[place] / 8000 - 0.25) < 0.02 for place in range(4))


def test_rejected_answers_stay_for_the_next_round_and_the_maximum_is_taken_anew():
    # After 100 is accepted, 0 is the pool's maximum and is accepted for certain, whatever beta.
    assert rejection_sample([0.0, 100.0], 2, 1e-3, random.Random(0)) == [1, 0]


def test_records_keep_everything_but_the_answers_that_were_not_chosen(tmp_path):
    (line,) = run(tmp_path, [LINE], "--strategy", "best_of_n", "--number", "2")
    assert line == LINE | {"answers": [LINE["answers"][1], LINE["answers"][0]], "rewards": {"1": 3.0, "0": 1.0}}
    (line,) = run(tmp_path, [LINE], "--strategy", "worst_of_n", "--number", "1")
    assert line["rewards"] == {"2": -0.5}


def test_pairs_are_the_best_against_the_worst_with_their_margin(tmp_path):
    (pair,) = run(tmp_path, [LINE], "--strategy", "best_of_n", "--form", "pairs")
    assert pair == {
        "id": "a",
        "context": ASK,
        "chosen": {"role": "assistant", "content": "y"},
        "rejected": {"role": "assistant", "content": "z"},
        "margin": 3.5,
        "meta": {"m": 1},
    }
    record = read_feedback(pair, "out.jsonl:1", 0)
    assert record.margin == 3.5 and record.messages == ASK


def test_random_pairs_are_different_and_the_higher_reward_is_chosen(tmp_path):
    options = ("--strategy", "random", "--form", "pairs", "--pairs", "random", "--num-pairs", "5")
    pairs = run(tmp_path, [LINE], *options)
    assert [pair["id"] for pair in pairs] == ["a-0", "a-1", "a-2"]
    contents = {(pair["chosen"]["content"], pair["rejected"]["content"]) for pair in pairs}
    assert contents == {("y", "x"), ("y", "z"), ("x", "z")} and all(pair["margin"] > 0 for pair in pairs)
    far = run(tmp_path, [LINE], *options, "--min-margin", "2")
    assert {pair["margin"] for pair in far} == {2.0, 3.5}


def test_chats_end_with_the_best_of_the_chosen_answers(tmp_path):
    (chat,) = run(tmp_path, [LINE], "--strategy", "best_of_n", "--form", "chats")
    assert chat == {
        "id": "a", "messages": [*ASK, {"role": "assistant", "content": "y"}], "label": "l", "meta": {"m": 1}
    }  # fmt: skip
    assert read_record(chat, "out.jsonl:1", 0).messages[-1]["content"] == "y"
    unscored = {key: value for key, value in LINE.items() if key != "rewards"}
    (chat,) = run(tmp_path, [unscored], "--strategy", "random", "--form", "chats")
    assert chat["messages"][-1]["content"] in "xyz"


def test_choice_depends_on_seed_and_record_alone(tmp_path):
    lines = [LINE | {"id": str(i)} for i in range(30)]
    options = ("--strategy", "rso", "--number", "2", "--seed")
    first = {line["id"]: line["rewards"] for line in run(tmp_path, lines, *options, "1")}
    again = {line["id"]: line["rewards"] for line in run(tmp_path, lines[::-1], *options, "1")}
    other = {line["id"]: line["rewards"] for line in run(tmp_path, lines, *options, "2")}
    assert first == again != other


def test_repeated_texts_count_once_and_what_was_done_is_said(tmp_path, capsys):
    twice = LINE | {"answers": [*LINE["answers"], {"id": "3", "content": "y"}], "rewards": LINE["rewards"] | {"3": 9.0}}
    (line,) = run(tmp_path, [twice], "--strategy", "best_of_n", "--number", "4")
    assert line["rewards"] == {"1": 3.0, "0": 1.0, "2": -0.5}
    out = capsys.readouterr().out
    assert "1 records with 4 answers -> 1 records" in out
    assert "1 answers that repeat another one's text" in out and "1 records have fewer answers than asked for" in out
    tied = LINE | {"rewards": {"0": 1, "1": 1, "2": 1}}
    assert run(tmp_path, [tied], "--strategy", "best_of_n", "--form", "pairs") == []
    assert "1 records have no two rewards that are far enough apart" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": []}, "rewards.jsonl:2: field 'answers' is empty"),
        ({"answers": "x"}, "field 'answers' is missing or wrong"),
        ({"answers": [{"id": "0"}]}, r"field 'answers\[0\].content' is missing or no text"),
        ({"rewards": None}, "field 'rewards' is missing. Score the file with a predict of a RewardModule"),
        ({"rewards": [1]}, "field 'rewards' is a list"),
        ({"rewards": {"0": 1.0, "1": 2.0}}, "field 'rewards.2' is missing"),
        ({"rewards": LINE["rewards"] | {"1": float("nan")}}, "field 'rewards.1' is nan"),
        ({"rewards": LINE["rewards"] | {"1": True}}, "field 'rewards.1' is True"),
        ({"answers": [{"id": "0", "content": "\ud800"}]}, r"field 'answers\[0\].content' holds .ud800, half of"),
        ({"messages": None, "conversations": [{"from": "human", "value": "q"}]}, "field 'messages' is null"),
        ({"answers": [{"id": [], "content": "x"}]}, r"field 'answers\[0\].id' is a list"),
        ({"rewards": LINE["rewards"] | {"1": 10**400}}, "more than 300 digits"),
        ({"id": "first"}, "'first' of 'd' was answered at .*rewards.jsonl:1 already"),
    ],
)
def test_line_at_fault_is_named_and_an_earlier_file_stays(change, message, tmp_path):
    (tmp_path / "out.jsonl").write_text("earlier\n")
    with pytest.raises(RecordError, match=message):
        run(tmp_path, [LINE | {"id": "first"}, LINE | change], "--strategy", "best_of_n", "--number", "1")
    assert (tmp_path / "out.jsonl").read_text() == "earlier\n"
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "rewards.jsonl"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--strategy", "rso", "--number", "0"), "--number is 0"),
        (("--strategy", "rso", "--number", "1", "--beta", "0"), "--beta is 0.0"),
        (("--strategy", "rso"), "--form records needs --number"),
    ],
)
def test_options_that_choose_nothing_are_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, [LINE], *options)


def test_file_that_exists_is_not_replaced_without_being_asked_to(tmp_path):
    source = write_jsonl(tmp_path / "rewards.jsonl", [LINE])
    with pytest.raises(ConfigError, match=r"out.jsonl exists. Choose another --out, or add --overwrite"):
        (tmp_path / "out.jsonl").write_text("")
        main([source, "--strategy", "best_of_n", "--number", "1", "--out", str(tmp_path / "out.jsonl")])


def test_command_line_says_what_is_wrong_in_one_message(tmp_path):
    source = write_jsonl(tmp_path / "rewards.jsonl", [LINE | {"rewards": None}])
    result = command("sample", source, "--strategy", "rso", "--number", "1", "--out", str(tmp_path / "o.jsonl"))
    assert result.returncode == 2 and "field 'rewards' is missing" in result.stderr and "Traceback" not in result.stderr

"""`lit-alignment sample`: choose among scored answers, and write the choice as pairs, chats or records."""

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lit_alignment.data.encoding.messages import Message, finite, read_id, value_kind
from lit_alignment.errors import ConfigError, RecordError
from lit_alignment.files import replaced
from lit_alignment.generation.prediction_file import read_predictions
from lit_alignment.tools import parsers

Strategy = Literal["random", "best_of_n", "worst_of_n", "rso"]
SampleForm = Literal["records", "pairs", "chats"]


@dataclass(frozen=True)
class Candidate:
    """One answer that can be chosen.

    Args:
        id: Its name within the record.
        content: Its text.
        reward: Its reward; None if the record was not scored.
        raw: The answer as the line has it.
    """

    id: str
    content: str
    reward: float | None
    raw: dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What is chosen and how it is written; see the command's help.

    Args:
        strategy: How answers are chosen.
        form: What is written.
        number: Answers to choose; None takes all, or for `random` chats one.
        beta: Temperature of rejection sampling, in units of the reward.
        pairs: Which pairs are made of the chosen answers.
        num_pairs: Random pairs a record.
        min_margin: Least difference of the rewards of a pair.
        seed: Seed of the choices.
    """

    strategy: Strategy
    form: SampleForm = "records"
    number: int | None = None
    beta: float = 0.5
    pairs: Literal["best_worst", "random"] = "best_worst"
    num_pairs: int = 1
    min_margin: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that choose nothing."""
        for name, value in (("number", self.number), ("num-pairs", self.num_pairs)):
            if value is not None and value < 1:
                raise ConfigError(f"--{name} is {value}; use 1 or more.")
        if not self.beta > 0:
            raise ConfigError(f"--beta is {self.beta}; use a number above 0.")
        if self.form == "records" and self.number is None:
            raise ConfigError("--form records needs --number: how many answers to keep.")

    @property
    def needs_rewards(self) -> bool:
        """Whether every answer must have a reward."""
        return self.strategy != "random" or self.form == "pairs"


def main(arguments: list[str]) -> None:
    """Choose, write, and print what became of the records.

    Raises:
        ConfigError: If the options contradict each other, or the output exists.
        RecordError: Naming the line and the offending field; an output that is there already is left as it is.
    """
    given = parsers.sample().parse_args(arguments)
    if given.out.exists() and not given.overwrite:
        raise ConfigError(f"{given.out} exists. Choose another --out, or add --overwrite.")
    options = Options(
        strategy=given.strategy,
        form=given.form,
        number=given.number,
        beta=given.beta,
        pairs=given.pairs,
        num_pairs=given.num_pairs,
        min_margin=given.min_margin,
        seed=given.seed,
    )
    counts: Counter[str] = Counter()
    with replaced(given.out) as file:
        for line, candidates in read_lines(given.files, options.needs_rewards, counts):
            for written in choose(line, candidates, options, counts):
                file.write(json.dumps(written, ensure_ascii=False) + "\n")
                counts["written"] += 1
            counts["records"] += 1
        if not counts["records"]:
            raise ConfigError(f"{given.files[0]}: no records.")
    print(summary(counts, options))
    print(f"{options.form}: {given.out}")


# Choosing.


def best_of_n(rewards: Sequence[float], number: int) -> list[int]:
    """Places of the highest rewards, best first; of equal ones the first goes first."""
    return sorted(range(len(rewards)), key=lambda i: -rewards[i])[:number]


def worst_of_n(rewards: Sequence[float], number: int) -> list[int]:
    """Places of the lowest rewards, worst first; of equal ones the first goes first."""
    return sorted(range(len(rewards)), key=rewards.__getitem__)[:number]


def rejection_sample(rewards: Sequence[float], number: int, beta: float, generator: random.Random) -> list[int]:
    """Places of accepted answers, in the order of acceptance: statistical rejection sampling.

    In each round every answer of the pool, in random order, is accepted with probability exp((r - max r) / beta), where
    the maximum is that of the pool as the round begins. Accepted answers leave the pool, so no answer is accepted
    twice; rejected ones stay for the next round. It ends with `number` answers, or when the pool is empty.

    Args:
        rewards: Reward of each answer.
        number: Answers to accept.
        beta: Small values accept the best only, large ones accept evenly; in units of the reward.
        generator: Source of all choices.

    Source: Liu et al. 2023 (arXiv:2309.06657), algorithm 1.
    """
    pool = list(range(len(rewards)))
    accepted: list[int] = []
    while pool and len(accepted) < number:
        highest = max(rewards[i] for i in pool)
        generator.shuffle(pool)
        rejected = []
        for place in pool:
            if len(accepted) < number and generator.random() < math.exp((rewards[place] - highest) / beta):
                accepted.append(place)
            else:
                rejected.append(place)
        pool = rejected
    return accepted


def choose(
    line: dict[str, Any], candidates: list[Candidate], options: Options, counts: Counter[str]
) -> list[dict[str, Any]]:
    """What is written of one record.

    Args:
        line: The record.
        candidates: Its answers, all different.
        options: What to choose.
        counts: Takes up records with too few answers, and pairs that are left out.
    """
    generator = record_generator(options.seed, line)
    number = len(candidates) if options.number is None else options.number
    if options.number is None and options.strategy == "random" and options.form == "chats":
        number = 1
    if len(candidates) < number:
        counts["short"] += 1
    chosen = [candidates[i] for i in _places(candidates, number, options, generator)]
    match options.form:
        case "records":
            return [_record(line, chosen)]
        case "chats":
            return [_chat(line, chosen)]
        case "pairs":
            return _pairs(line, chosen, options, generator, counts)


def _places(candidates: Sequence[Candidate], number: int, options: Options, generator: random.Random) -> Sequence[int]:
    rewards = [0.0 if candidate.reward is None else candidate.reward for candidate in candidates]
    match options.strategy:
        case "random":
            return generator.sample(range(len(candidates)), min(number, len(candidates)))
        case "best_of_n":
            return best_of_n(rewards, number)
        case "worst_of_n":
            return worst_of_n(rewards, number)
        case "rso":
            return rejection_sample(rewards, number, options.beta, generator)


def record_generator(seed: int, line: dict[str, Any]) -> random.Random:
    """A generator that depends on the seed and on the record, not on where the record stands."""
    digest = hashlib.sha256(f"{seed}/{line['dataset']}/{line['id']}/sample".encode()).digest()
    return random.Random(digest)


# Writing.


def _record(line: dict[str, Any], chosen: Sequence[Candidate]) -> dict[str, Any]:
    written = {**line, "answers": [candidate.raw for candidate in chosen]}
    if "rewards" in line:
        written["rewards"] = {candidate.id: candidate.reward for candidate in chosen}
    return written


def _chat(line: dict[str, Any], chosen: Sequence[Candidate]) -> dict[str, Any]:
    best = max(chosen, key=lambda candidate: -math.inf if candidate.reward is None else candidate.reward)
    written = {"id": line["id"], "messages": [*line["messages"], _response(best)]}
    return written | {name: line[name] for name in ("label", "meta", "tools") if line.get(name) is not None}


def _pairs(
    line: dict[str, Any], chosen: list[Candidate], options: Options, generator: random.Random, counts: Counter[str]
) -> list[dict[str, Any]]:
    """Preferences among the chosen answers; those that are too close are counted and left out."""
    ordered = [(a, b) for a in chosen for b in chosen if (a.reward or 0.0) > (b.reward or 0.0)]
    if options.pairs == "best_worst":
        ordered = [max(ordered, key=_margin)] if ordered else []
    apart = [pair for pair in ordered if _margin(pair) >= options.min_margin]
    if not apart:
        counts["without a pair"] += 1
    if options.pairs == "random":
        apart = generator.sample(apart, min(options.num_pairs, len(apart)))
    written = []
    for number, (better, worse) in enumerate(apart):
        pair = {
            "id": line["id"] if len(apart) == 1 else f"{line['id']}-{number}",
            "context": line["messages"],
            "chosen": _response(better),
            "rejected": _response(worse),
            "margin": _margin((better, worse)),
        }
        written.append(pair | ({"meta": line["meta"]} if line.get("meta") is not None else {}))
    return written


def _margin(pair: tuple[Candidate, Candidate]) -> float:
    better, worse = pair
    return (better.reward or 0.0) - (worse.reward or 0.0)


def _response(candidate: Candidate) -> Message:
    return {"role": "assistant", "content": candidate.content}


def summary(counts: Counter[str], options: Options) -> str:
    """One line about what was read and written."""
    parts = [f"{counts['records']} records with {counts['answers']} answers -> {counts['written']} {options.form}"]
    if counts["same"]:
        parts.append(f"{counts['same']} answers that repeat another one's text were passed over")
    if counts["short"]:
        parts.append(f"{counts['short']} records have fewer answers than asked for; all of these were taken")
    if counts["without a pair"]:
        parts.append(f"{counts['without a pair']} records have no two rewards that are far enough apart")
    return "; ".join(parts)


# Reading.


def read_lines(
    paths: Sequence[Path], needs_rewards: bool, counts: Counter[str]
) -> Iterator[tuple[dict[str, Any], list[Candidate]]]:
    """Each line with its different answers.

    Args:
        paths: Prediction files.
        needs_rewards: Whether an answer without a reward is an error.
        counts: Takes up answers, and those that repeat another one.

    Raises:
        FileNotFoundError: If a file is not there.
        RecordError: Naming the line and the offending field.
    """
    for line, record in read_predictions(paths):
        yield line, _different(read_candidates(line, record.where, needs_rewards), counts)


def read_candidates(line: dict[str, Any], where: str, needs_rewards: bool) -> list[Candidate]:
    """The answers of one line, with their rewards.

    Raises:
        RecordError: Naming the offending field.
    """
    answers, rewards = line["answers"], line.get("rewards")
    if rewards is None and needs_rewards:
        fix = "Score the file with a predict of a RewardModule, or use --strategy random without --form pairs."
        raise RecordError(where, "rewards", "is missing", fix)
    if rewards is not None and not isinstance(rewards, dict):
        raise RecordError(where, "rewards", f"is {value_kind(rewards)}", "Give {answer id: number}.")
    candidates = []
    for index, answer in enumerate(answers):
        if not isinstance(answer, dict) or not isinstance(answer.get("content"), str):
            raise RecordError(where, f"answers[{index}].content", "is missing or no text", "Mend or remove the answer.")
        own = read_id(answer.get("id"), f"answers[{index}].id", where, index)
        reward = None if rewards is None else _reward(rewards, own, where)
        candidates.append(Candidate(own, answer["content"], reward, answer))
    return candidates


def _reward(rewards: dict[str, Any], own: str, where: str) -> float:
    if own not in rewards:
        raise RecordError(where, f"rewards.{own}", "is missing", "Score all answers of a record, or none.")
    if (number := finite(rewards[own])) is None:
        raise RecordError(where, f"rewards.{own}", f"is {rewards[own]!r}", "Give a finite number.")
    return number


def _different(candidates: list[Candidate], counts: Counter[str]) -> list[Candidate]:
    """Each text once: a second copy would fill a place, and as a pair teach nothing."""
    first: dict[str, Candidate] = {}
    for candidate in candidates:
        first.setdefault(candidate.content, candidate)
    counts["answers"] += len(candidates)
    counts["same"] += len(candidates) - len(first)
    return list(first.values())

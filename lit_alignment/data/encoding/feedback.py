"""From one raw record about responses, in any of the common forms, to one prompt with its responses."""

from dataclasses import dataclass, field
from typing import Any, TypedDict

from lit_alignment.data.encoding.messages import (
    Message,
    Record,
    finite,
    read_id,
    read_message,
    read_record,
    value_kind,
    with_system,
)
from lit_alignment.errors import RecordError


class ScoredResponse(TypedDict):
    """One response to a prompt.

    Args:
        id: Its name within the record.
        messages: The response; several if the conversation goes on behind its first message, and the last is then the
            assistant's, too.
        score: How good it is, higher is better: 1 for the chosen response of a pair or a good one alone, 0 for the
            rejected or a bad one; a reward as it is; less its rank in a ranking. None if nothing is known.
    """

    id: str
    messages: list[Message]
    score: float | None


@dataclass
class Feedback(Record):
    """A prompt, in `messages`, with responses to it and how good they are.

    Args:
        responses: What follows the prompt, each with its score; one response if it is judged alone.
        margin: How far apart the scores of a pair should be.
        steps: Texts of the response's steps, where these are judged one by one; `responses` is then empty.
        step_labels: 1 or 0 for each step; empty if nothing is known.
        subset: The part of a benchmark that it belongs to.
        alone: Whether the record's form is that of one response, judged alone.
    """

    responses: list[ScoredResponse] = field(default_factory=list)
    margin: float | None = None
    steps: list[str] = field(default_factory=list)
    step_labels: list[float] = field(default_factory=list)
    subset: str | None = None
    alone: bool = False


PAIRS = (("chosen", "rejected"), ("answer_w", "answer_l"))
PAIR_NAMES = tuple(name for names in PAIRS for name in names)
CONTEXTS = ("context", "prompt", "messages")
STEPS = ("steps", "completions")
SINGLES = ("completion", "answer")
RESPONSES = (*PAIR_NAMES, "candidates", "answers", *STEPS, *SINGLES)  # fields that hold responses


def read_feedback(raw: object, where: str, position: int) -> Feedback:
    """Return the prompt and responses of one raw record.

    Read are pairs (`chosen`, `rejected`; `answer_w`, `answer_l`), `candidates` with a `ranking`, `answers` with
    `rewards` (what predict and sample write), steps (`steps` or `completions`, with `labels`), and one judged response:
    `prompt`, `completion`, `label`; `context`, `answer`, `is_desirable`; or `messages` that end with it, and `label`.
    The prompt stands in `context`, `prompt` or `messages`, or is what `chosen` and `rejected` begin with in common.

    Args:
        raw: The parsed JSON value.
        where: File and line.
        position: Index in the file, the id of a record that has none.

    Raises:
        RecordError: Naming the field and the fix.
    """
    if not isinstance(raw, dict):
        raise RecordError(where, "", f"the record is {value_kind(raw)}, not an object", "Write one JSON object a line.")
    pair = next((names for names in PAIRS if all(name in raw for name in names)), None)
    half = next((name for names in PAIRS for name in names if name in raw), None)
    rest: dict[str, Any] = {}
    if pair is not None:
        prompt, rest["responses"] = _read_pair(raw, pair, where)
        rest["margin"] = _read_margin(raw, where)
    elif half is not None:
        other = next(name for names in PAIRS if half in names for name in names if name != half)
        found = ", ".join(f"'{key}'" for key in raw)
        raise RecordError(where, other, f"is missing (found: {found})", f"Give it beside '{half}'.")
    elif "candidates" in raw:
        prompt, rest["responses"] = _read_context(raw, where), _read_candidates(raw, where)
    elif "answers" in raw:
        prompt, rest["responses"] = _read_context(raw, where), _read_answers(raw, where)
    elif steps := next((name for name in STEPS if name in raw), None):
        prompt = _read_context(raw, where)
        rest["steps"], rest["step_labels"] = _read_steps(raw, steps, where)
    else:
        prompt, rest["responses"] = _read_single(raw, where)
        rest["alone"] = True
    outer = read_record({**raw, "messages": prompt or [{"role": "user", "content": ""}]}, where, position)
    subset = raw.get("subset")
    if subset is not None and not isinstance(subset, str):
        raise RecordError(where, "subset", f"is {value_kind(subset)}", "Make it a string.")
    return Feedback(**(vars(outer) | {"messages": prompt}), **rest, subset=subset)


def _read_context(raw: dict[str, Any], where: str) -> list[Message]:
    """The prompt's messages."""
    name = next((name for name in CONTEXTS if name in raw), None)
    if name is None:
        found = ", ".join(f"'{key}'" for key in raw)
        raise RecordError(where, "context", f"is missing (found: {found})", "Give 'context', 'prompt' or 'messages'.")
    value = raw[name]
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        problem = "is empty" if value == [] else f"is {value_kind(value)}"
        raise RecordError(where, name, problem, "Make it a text, or a list of {role, content} objects.")
    messages = [read_message(message, index, where) for index, message in enumerate(value)]
    return with_system(raw, name, messages, where)


def _read_response(value: object, name: str, where: str) -> list[Message]:
    """A response as messages, of which the last is the response itself."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    found = value if isinstance(value, list) else [value]
    if not found or not all(isinstance(message, dict) for message in found):
        problem = "is empty" if value == [] else f"is {value_kind(value)}"
        raise RecordError(where, name, problem, "Make it a text, a message, or a list of messages.")
    # A response without a role, as some data sets write it, is the assistant's.
    messages = [
        read_message({"role": "assistant", **m} if "from" not in m else m, i, where) for i, m in enumerate(found)
    ]
    if messages[-1]["role"] != "assistant":
        raise RecordError(
            where, name, f"ends with a message of the {messages[-1]['role']}", "End with the assistant's."
        )
    if messages[0]["role"] != "assistant" and name not in PAIR_NAMES:
        raise RecordError(
            where, name, f"begins with a message of the {messages[0]['role']}", "Give the response alone."
        )
    return messages


def _read_pair(raw: dict[str, Any], names: tuple[str, str], where: str) -> tuple[list[Message], list[ScoredResponse]]:
    """The prompt, which both conversations begin with, and what follows it in each."""
    sides = [_read_response(raw[name], name, where) for name in names]
    context = _read_context(raw, where) if any(name in raw for name in CONTEXTS) else []
    # Whole conversations, with the prompt or without it beside them.
    whole = [side if side[: len(context)] == context else context + side for side in sides]
    shared = 0
    while shared < min(map(len, whole)) - 1 and whole[0][shared] == whole[1][shared]:
        shared += 1
    while shared > len(context) and not all(side[shared]["role"] == "assistant" for side in whole):
        shared -= 1  # what differs before a response is a part of the responses
    if not shared or not all(side[shared]["role"] == "assistant" for side in whole):
        if sides[0][0]["role"] == "assistant":
            raise RecordError(where, "context", "is missing", "Give 'context', 'prompt' or 'messages'.")
        problem = f"does not begin with the messages of '{names[0]}'"
        raise RecordError(where, names[1], problem, "Let them differ from a message of the assistant's on.")
    scored = zip(("chosen", "rejected"), whole, (1.0, 0.0), strict=True)
    return whole[0][:shared], [{"id": name, "messages": side[shared:], "score": score} for name, side, score in scored]


def _read_margin(raw: dict[str, Any], where: str) -> float | None:
    name = next((name for name in ("margin", "precomputed_margin") if raw.get(name) is not None), None)
    return None if name is None else _number(raw[name], name, where)


def _read_candidates(raw: dict[str, Any], where: str) -> list[ScoredResponse]:
    candidates = _filled_list(raw, "candidates", where, "Make it a list of texts or messages.")
    ranking = raw.get("ranking")
    if ranking is not None and (not isinstance(ranking, list) or len(ranking) != len(candidates)):
        raise RecordError(
            where,
            "ranking",
            f"is not a list of {len(candidates)} ranks",
            "Give the rank of each candidate, 1 for the best.",
        )
    responses: list[ScoredResponse] = []
    for index, candidate in enumerate(candidates):
        name = f"candidates[{index}]"
        own = read_id(candidate.get("id") if isinstance(candidate, dict) else None, f"{name}.id", where, index)
        messages = _read_response(candidate, name, where)
        score = None if ranking is None else -_number(ranking[index], f"ranking[{index}]", where)
        responses.append({"id": own, "messages": messages, "score": score})
    return _different_ids(responses, "candidates", where)


def _read_answers(raw: dict[str, Any], where: str) -> list[ScoredResponse]:
    """Answers of a sampling record, with their rewards if it has some."""
    answers = _filled_list(raw, "answers", where, "Give a list of {id, content} objects.")
    rewards = raw.get("rewards")
    if rewards is not None and not isinstance(rewards, dict):
        raise RecordError(where, "rewards", f"is {value_kind(rewards)}", "Give {answer id: number}.")
    responses: list[ScoredResponse] = []
    for index, answer in enumerate(answers):
        name = f"answers[{index}]"
        if not isinstance(answer, dict):
            raise RecordError(where, name, f"is {value_kind(answer)}", "Give {id, content} objects.")
        own = read_id(answer.get("id"), f"{name}.id", where, index)
        score = None
        if rewards is not None:
            if own not in rewards:
                raise RecordError(
                    where, f"rewards.{own}", "is missing", "Give a reward for each answer, or none at all."
                )
            score = _number(rewards[own], f"rewards.{own}", where)
        messages = _read_response({"content": answer.get("content")}, name, where)
        responses.append({"id": own, "messages": messages, "score": score})
    return _different_ids(responses, "answers", where)


def _read_steps(raw: dict[str, Any], name: str, where: str) -> tuple[list[str], list[float]]:
    steps = _filled_list(raw, name, where, "Give a list of texts.")
    for index, step in enumerate(steps):
        if not isinstance(step, str):
            raise RecordError(where, f"{name}[{index}]", f"is {value_kind(step)}", "Make it a text.")
    labels = raw.get("labels")
    if labels is None:
        return steps, []
    if not isinstance(labels, list) or len(labels) != len(steps):
        raise RecordError(where, "labels", f"is not a list of {len(steps)} labels", "Give 1 or 0 for each step.")
    return steps, [_binary(label, f"labels[{index}]", where) for index, label in enumerate(labels)]


def _read_single(raw: dict[str, Any], where: str) -> tuple[list[Message], list[ScoredResponse]]:
    """One judged response."""
    name = next((name for name in SINGLES if name in raw), None)
    if name is not None:
        prompt, response = _read_context(raw, where), _read_response(raw[name], name, where)
    else:
        messages = _read_context(raw, where)
        prompt, response = messages[:-1], messages[-1:]
        if messages[-1]["role"] != "assistant" or not prompt:
            raise RecordError(
                where,
                "messages",
                "hold no response to judge",
                "End them with the assistant's message, or give 'chosen' and 'rejected', 'candidates' or 'answers'.",
            )
    judged = next((name for name in ("label", "is_desirable") if raw.get(name) is not None), None)
    score = None if judged is None else _binary(raw[judged], judged, where)
    return prompt, [{"id": "0", "messages": response, "score": score}]


def _different_ids(responses: list[ScoredResponse], name: str, where: str) -> list[ScoredResponse]:
    ids = [response["id"] for response in responses]
    twice = next((own for own in ids if ids.count(own) > 1), None)
    if twice is not None:
        raise RecordError(where, name, f"holds id '{twice}' twice", "Give each its own.")
    return responses


def _filled_list(raw: dict[str, Any], name: str, where: str, fix: str) -> list[Any]:
    value = raw[name]
    if not isinstance(value, list) or not value:
        problem = "is empty" if value == [] else f"is {value_kind(value)}"
        raise RecordError(where, name, problem, fix)
    return value


def _number(value: object, name: str, where: str) -> float:
    if (number := finite(value)) is None:
        shown = value if isinstance(value, float) else value_kind(value)
        raise RecordError(where, name, f"is {shown}", "Give a finite number, of 32 bits at most.")
    return number


def _binary(value: object, name: str, where: str) -> float:
    if value not in (0, 1):  # true and false are 1 and 0
        raise RecordError(where, name, f"is {value!r}", "Give 1 (or true) for a good one, 0 (or false) for a bad one.")
    return float(value)

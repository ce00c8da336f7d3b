"""Metrics of generated answers. Each is a mean over prompts, except where its formula says otherwise."""

import math
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.text.rouge import rouge_score

from lit_alignment.errors import ConfigError
from lit_alignment.evaluation.bleu import bleu, ngrams


@dataclass
class Answered:
    """One prompt's answers and what the metrics need to know about them.

    Args:
        answers: Their texts; at least one.
        reference: The text that was wanted, if known.
        num_tokens: Tokens of each answer, if known.
        logps: Log-probability of each token of each answer under the model; [] for an answer without tokens.
        base_logps: The same under the base model.
        rewards: A reward model's raw score of each answer.
        document_utilities: For each answer, what each document, and all of them together, take off its cross-entropy.
    """

    answers: list[str]
    reference: str | None = None
    num_tokens: list[int] | None = None
    logps: list[list[float]] | None = None
    base_logps: list[list[float]] | None = None
    rewards: list[float] | None = None
    document_utilities: list[list[float]] = field(default_factory=list)


class AnswerMetric(Metric):
    """Sums one or more values over prompts; a prompt for which a value is not defined does not count in its mean.

    Args:
        names: Names of the values.
    """

    totals: Tensor
    counts: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        """Start at nothing."""
        super().__init__()
        self.names = tuple(names)
        self.add_state("totals", torch.zeros(len(names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(names), dtype=torch.float64), dist_reduce_fx="sum")

    @abstractmethod
    def values(self, item: Answered) -> dict[str, float]:
        """The values of one prompt by name; what is not defined for it is left out."""

    def update(self, item: Answered) -> None:
        """Add one prompt."""
        for name, value in self.values(item).items():
            place = self.names.index(name)
            self.totals[place] += value
            self.counts[place] += 1

    def compute(self) -> dict[str, float]:
        """Means by name over the prompts of all ranks, every one of which has to call this."""
        return self.means()

    def means(self) -> dict[str, float]:
        """Means by name over the prompts of this process; a value that no prompt had is left out."""
        return {
            name: float(total / count)
            for name, total, count in zip(self.names, self.totals, self.counts, strict=True)
            if count > 0
        }


class ExactMatch(AnswerMetric):
    """Share of answers that equal the reference, white space at the ends aside."""

    def __init__(self) -> None:
        """One value."""
        super().__init__(["exact_match"])

    def values(self, item: Answered) -> dict[str, float]:
        """Needs a reference."""
        if item.reference is None:
            return {}
        return {"exact_match": _mean([answer.strip() == item.reference.strip() for answer in item.answers])}


class Length(AnswerMetric):
    """Tokens, where they are known, words and characters of an answer."""

    def __init__(self) -> None:
        """Three values."""
        super().__init__(["length_tokens", "length_words", "length_characters"])

    def values(self, item: Answered) -> dict[str, float]:
        """Means over the prompt's answers."""
        found = {
            "length_words": _mean([len(answer.split()) for answer in item.answers]),
            "length_characters": _mean([len(answer) for answer in item.answers]),
        }
        return found if item.num_tokens is None else {"length_tokens": _mean(item.num_tokens), **found}


class Distinct(AnswerMetric):
    """Distinct n-grams of words as a share of all n-grams in a prompt's answers, and the expectation-adjusted form.

    distinct_n = |set of n-grams| / number of n-grams
    ead_n = |set of n-grams| / (V (1 - ((V - 1) / V)^number of n-grams))

    The plain form falls with the length of a text alone; the adjusted one divides by what V equally likely n-grams
    would give.

    Args:
        ngram: Largest n.
        vocabulary: V; None leaves the adjusted form out.

    Raises:
        ConfigError: If `ngram` is below 1 or `vocabulary` below 2.

    Source: Li et al. 2016 (arXiv:1510.03055); adjusted: Liu et al. 2022 (arXiv:2202.13587).
    """

    def __init__(self, ngram: int = 3, vocabulary: int | None = None) -> None:
        """A value for each n, and for each form."""
        if vocabulary is not None and vocabulary < 2:
            raise ConfigError(f"vocabulary is {vocabulary}; use 2 or more, or leave it out.")
        orders = range(1, _checked(ngram) + 1)
        adjusted = [] if vocabulary is None else [f"ead_{n}" for n in orders]
        super().__init__([*(f"distinct_{n}" for n in orders), *adjusted])
        self.ngram, self.vocabulary = ngram, vocabulary

    def values(self, item: Answered) -> dict[str, float]:
        """Not defined for an n that is longer than all answers."""
        found = {}
        for n in range(1, self.ngram + 1):
            grams = [gram for answer in item.answers for gram in ngrams(answer.split(), n)]
            if not grams:
                continue
            found[f"distinct_{n}"] = len(set(grams)) / len(grams)
            if self.vocabulary is not None:
                expected = self.vocabulary * -math.expm1(len(grams) * math.log1p(-1 / self.vocabulary))
                found[f"ead_{n}"] = len(set(grams)) / expected
        return found


class Diversity(AnswerMetric):
    """Entropy of the words of an answer, in nats: -sum p log p over their frequencies; a mean over answers.

    Args:
        top_k: Count only the k most frequent words, whose frequencies are then made to sum to 1.
    """

    def __init__(self, top_k: int | None = None) -> None:
        """One value."""
        super().__init__(["diversity"])
        self.top_k = top_k

    def values(self, item: Answered) -> dict[str, float]:
        """Not defined where no answer has a word."""
        entropies = []
        for answer in item.answers:
            counts = [count for _, count in Counter(answer.split()).most_common(self.top_k)]
            total = sum(counts)
            if total:
                entropies.append(-sum(c / total * math.log(c / total) for c in counts))
        return {"diversity": _mean(entropies)} if entropies else {}


class SelfBLEU(AnswerMetric):
    """BLEU, on words, of each answer of a prompt against its other answers.

    1 where all are alike, and at least `ngram` words long: smoothing lowers the value of shorter ones.

    Args:
        ngram: Largest n; orders weigh equally.

    Raises:
        ConfigError: If `ngram` is below 1.

    Source: Zhu et al. 2018 (arXiv:1802.01886).
    """

    def __init__(self, ngram: int = 3) -> None:
        """One value."""
        super().__init__(["self_bleu"])
        self.ngram = _checked(ngram)

    def values(self, item: Answered) -> dict[str, float]:
        """Not defined for a single answer."""
        words = [answer.split() for answer in item.answers]
        if len(words) < 2:
            return {}
        others = [words[:i] + words[i + 1 :] for i in range(len(words))]
        return {"self_bleu": _mean([bleu(w, o, self.ngram) for w, o in zip(words, others, strict=True)])}


class ROUGE(AnswerMetric):
    """Overlap with the reference: n-grams (1 and 2) and longest common subsequence; precision, recall and F1.

    Words are compared in lower case, without punctuation and unstemmed. Letters of every script count; torchmetrics'
    own normalisation keeps a-z and digits only, so that a text in another script would have 0.

    Source: Lin 2004 (aclanthology.org/W04-1013), as torchmetrics computes it.
    """

    KEYS = ("rouge1", "rouge2", "rougeL")

    def __init__(self) -> None:
        """Three values for each kind."""
        super().__init__([f"{key}_{part}" for key in self.KEYS for part in ("precision", "recall", "fmeasure")])

    def values(self, item: Answered) -> dict[str, float]:
        """Needs a reference."""
        if item.reference is None:
            return {}
        found = [
            rouge_score(answer, item.reference, rouge_keys=self.KEYS, normalizer=_without_punctuation)
            for answer in item.answers
        ]
        return {name: _mean([float(scores[name]) for scores in found]) for name in self.names}


class Perplexity(AnswerMetric):
    """exp(-sum of log-probabilities / number of tokens), over the answer tokens of all prompts, the first included."""

    def __init__(self) -> None:
        """One value."""
        super().__init__(["perplexity"])

    def values(self, item: Answered) -> dict[str, float]:
        """Needs log-probabilities, and a token."""
        tokens = [logp for answer in item.logps or [] for logp in answer]
        return {"perplexity": math.exp(-_mean(tokens))} if tokens else {}

    def update(self, item: Answered) -> None:
        """Add the tokens of one prompt."""
        for answer in item.logps or []:
            self.totals[0] -= sum(answer)
            self.counts[0] += len(answer)

    def means(self) -> dict[str, float]:
        """The perplexity over all tokens."""
        return {name: math.exp(mean) for name, mean in super().means().items()}


class KLToBase(AnswerMetric):
    """How far the model has moved from its base, in nats a token, estimated on its own answers.

    kl = mean over the tokens of all prompts of log p(token) - log p_base(token)

    This is the plain Monte-Carlo estimate (k1): its expectation over the model's samples is the divergence, and a
    single value may be negative. Answers should be sampled at temperature 1. Source: joschu.net/blog/kl-approx.html.
    """

    def __init__(self) -> None:
        """One value."""
        super().__init__(["kl"])

    def values(self, item: Answered) -> dict[str, float]:
        """Needs log-probabilities under both."""
        differences = self._differences(item)
        return {"kl": _mean(differences)} if differences else {}

    def update(self, item: Answered) -> None:
        """Add the tokens of one prompt; a long answer counts for more than a short one."""
        differences = self._differences(item)
        self.totals[0] += sum(differences)
        self.counts[0] += len(differences)

    def _differences(self, item: Answered) -> list[float]:
        if item.logps is None or item.base_logps is None:
            return []
        pairs = zip(item.logps, item.base_logps, strict=True)
        return [a - b for ours, base in pairs for a, b in zip(ours, base, strict=True)]


class Reward(AnswerMetric):
    """A reward model's raw score, a mean over a prompt's answers, and that of its best answer."""

    def __init__(self) -> None:
        """Two values."""
        super().__init__(["reward", "reward_best"])

    def values(self, item: Answered) -> dict[str, float]:
        """Needs scores."""
        return {"reward": _mean(item.rewards), "reward_best": max(item.rewards)} if item.rewards else {}


class RetrievalUtility(AnswerMetric):
    """What retrieved documents take off the cross-entropy of an answer, in nats a token.

    utility(d) = CE(answer | question) - CE(answer | question and d), for each document and for all together

    Args:
        num_documents: Documents that have a value of their own.
    """

    def __init__(self, num_documents: int = 5) -> None:
        """A value for each document, and for all together."""
        each = [f"retrieval_utility_{i}" for i in range(1, num_documents + 1)]
        super().__init__(["retrieval_utility_all", *each])

    def values(self, item: Answered) -> dict[str, float]:
        """Needs documents."""
        columns = list(zip(*item.document_utilities, strict=True))
        if not columns:
            return {}
        *each, together = (_mean(column) for column in columns)
        return {"retrieval_utility_all": together, **dict(zip(self.names[1:], each, strict=False))}


TEXT_METRICS = ("exact_match", "length", "distinct", "diversity", "self_bleu", "rouge")
MODEL_METRICS = ("perplexity", "kl", "reward", "retrieval_utility")


def build_metric(name: str, ngram: int = 3, vocabulary: int | None = None) -> AnswerMetric:
    """The metric of a name.

    Raises:
        ConfigError: If there is none; the message names the nearest.
    """
    match name:
        case "exact_match":
            return ExactMatch()
        case "length":
            return Length()
        case "distinct":
            return Distinct(ngram, vocabulary)
        case "diversity":
            return Diversity()
        case "self_bleu":
            return SelfBLEU(ngram)
        case "rouge":
            return ROUGE()
        case "perplexity":
            return Perplexity()
        case "kl":
            return KLToBase()
        case "reward":
            return Reward()
        case "retrieval_utility":
            return RetrievalUtility()
    from difflib import get_close_matches

    known = [*TEXT_METRICS, *MODEL_METRICS]
    close = get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(known)}."
    raise ConfigError(f"unknown metric '{name}'. {hint}")


def _without_punctuation(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text.lower())


def _checked(ngram: int) -> int:
    if ngram < 1:
        raise ConfigError(f"ngram is {ngram}; use 1 or more.")
    return ngram


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

"""BLEU of one text against others, on words."""

import math
from collections import Counter
from collections.abc import Sequence


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n words."""
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def bleu(words: Sequence[str], references: Sequence[Sequence[str]], ngram: int) -> float:
    """BLEU of one text against several, in [0, 1].

    bleu = min(1, exp(1 - r / c)) * exp(mean over n of log p_n)

    p_n is the share of n-grams that a reference has, each counted as often as the reference has it at most; c is the
    text's length and r that of the reference nearest in length. An order without a match counts 0.1 matches, and one
    without n-grams counts 0.1 of 1 (method 1); a text that shares no word with a reference has 0, as in NLTK.

    Source: Papineni et al. 2002 (aclanthology.org/P02-1040); smoothing: Chen and Cherry 2014
    (aclanthology.org/W14-3346).
    """
    if not words:
        return 0.0
    logs = []
    for n in range(1, ngram + 1):
        counts = Counter(ngrams(words, n))
        limits: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            limits |= Counter(ngrams(reference, n))
        matches = sum(min(count, limits[gram]) for gram, count in counts.items())
        if n == 1 and matches == 0:
            return 0.0
        logs.append(math.log((matches or 0.1) / max(1, counts.total())))
    nearest = min((abs(len(reference) - len(words)), len(reference)) for reference in references)[1]
    brevity = min(1.0, math.exp(1 - nearest / len(words)))
    return brevity * math.exp(sum(logs) / ngram)

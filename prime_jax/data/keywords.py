"""Words that tell texts apart, by TF-IDF: keywords of a question, names of clusters."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32

COMMON = 0.05  # a word in more than this share of the passages tells nothing: "the", "is", "when"
FEW = 10  # passages; a word that is in no more of them always tells something
NAMED_BY = 3
_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case: two or more characters, at least one of them a letter."""
    found = _WORD.findall(text.lower())
    return [word for word in found if len(word) > 1 and any(map(str.isalpha, word))]


@dataclass(frozen=True)
class Vocabulary:
    """In how many passages each word is.

    Attributes:
        passages: How many passages there are.
        frequency: Of each word, in how many of them it is.
    """

    passages: int
    frequency: Mapping[str, int]

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Vocabulary":
        """Count the words of a corpus."""
        frequency: Counter[str] = Counter()
        passages = 0
        for text in texts:
            passages += 1
            frequency.update(set(words_of(text)))
        return cls(passages, frequency)

    def tells(self, word: str) -> bool:
        """Whether some passages have a word, but not too many."""
        return 0 < self.frequency.get(word, 0) <= max(FEW, COMMON * self.passages)

    def idf(self, word: str) -> float:
        """Logarithm of the inverse share of the passages that have a word."""
        return math.log(self.passages / self.frequency[word])


def keywords_of(text: str, vocabulary: Vocabulary, most: int) -> list[str]:
    """The words of a text of highest TF-IDF, the best first, equals in the order of the alphabet.

    Words that no passage has, or too many, are left out; there may be none left.
    """
    counts = Counter(word for word in words_of(text) if vocabulary.tells(word))
    return _best({word: count * vocabulary.idf(word) for word, count in counts.items()}, most)


def name_clusters(
    texts: Sequence[str], assignment: Int32[np.ndarray, " M"], vocabulary: Vocabulary, most: int
) -> list[dict[str, Any]]:
    """What clusters are about: their words of highest class-based TF-IDF (Grootendorst 2022).

    Args:
        texts: The passages, M of them.
        assignment: Their clusters; none of the C is empty.
        vocabulary: Of the passages.
        most: Keywords of a cluster.

    Returns:
        For each cluster `name` (its first three keywords, or its number where it has none), `keywords` and
        `size`, in passages.
    """
    counts: list[Counter[str]] = [Counter() for _ in range(int(assignment.max()) + 1)]
    for text, cluster in zip(texts, assignment.tolist(), strict=True):
        counts[cluster].update(word for word in words_of(text) if vocabulary.tells(word))
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    average = total.total() / len(counts)
    sizes = np.bincount(assignment).tolist()
    named = []
    for number, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        words = max(count.total(), 1)
        scores = {word: n / words * math.log(1 + average / total[word]) for word, n in count.items()}
        best = _best(scores, most)
        named.append(
            {"name": ", ".join(best[:NAMED_BY]) or f"cluster {number}", "keywords": best, "size": size}
        )
    return named


def _best(scores: Mapping[str, float], most: int) -> list[str]:
    return sorted(scores, key=lambda word: (-scores[word], word))[:most]

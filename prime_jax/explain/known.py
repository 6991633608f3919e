"""What is known already: the pairs of training data, and how the model usually answers."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int

from prime_jax.explain.explanation import KnownPair
from prime_jax.retrieval.topk import ExactIndex
from prime_jax.retrieval.vectors import unit


class KnownPairs:
    """Pairs of question and source to compare a new question and its prediction with.

    Args:
        questions: Unit embeddings of the questions, `[P, D]`.
        sources: Unit embeddings of their sources, `[P, E]`.
        question_texts: P texts.
        source_texts: P texts.
        source_ids: P ids.
    """

    def __init__(
        self,
        questions: Float32[np.ndarray, "P D"],
        sources: Float32[np.ndarray, "P E"],
        question_texts: Sequence[str],
        source_texts: Sequence[str],
        source_ids: Sequence[str],
    ):
        self._index = ExactIndex(_joined(questions, sources))
        self._texts = list(zip(question_texts, source_texts, source_ids, strict=True))

    def nearest(
        self, questions: Float32[np.ndarray, "B D"], predicted: Float32[np.ndarray, "B E"], count: int
    ) -> list[tuple[KnownPair, ...]]:
        """The `count` pairs with the highest mean of the two cosines, for each question."""
        count = min(count, len(self._texts))
        scores, rows = self._index.search(_joined(questions, predicted), count)
        return [
            tuple(
                self._pair(int(row), float(score)) for score, row in zip(found, ids, strict=True) if row >= 0
            )
            for found, ids in zip(scores, rows, strict=True)
        ]

    def _pair(self, row: int, similarity: float) -> KnownPair:
        question, source, source_id = self._texts[row]
        return KnownPair(question, source, source_id, similarity)


class Usual(NamedTuple):
    """How sure and how far off the model is on questions whose answers are known, each sorted.

    Attributes:
        confidence: Weight of the primary subspace, `[n]`.
        atypicality: Norm of the fine part, `[n]`.
        influence: Distance that steering moves predictions, `[n]`.
    """

    confidence: Float32[np.ndarray, " n"]
    atypicality: Float32[np.ndarray, " n"]
    influence: Float32[np.ndarray, " n"]


def rank_among(sorted_values: Float32[np.ndarray, " n"], value: float) -> float:
    """Share of the values that are smaller, 0 to 1; equal ones count half."""
    ends = (np.searchsorted(sorted_values, value, side) for side in ("left", "right"))
    return float(sum(ends) / 2 / max(len(sorted_values), 1))


def nearest_centroid(
    predicted: Float32[np.ndarray, "B E"], centroids: Float32[np.ndarray, "C E"]
) -> Int[np.ndarray, " B"]:
    """Number of the centroid with the highest cosine."""
    return np.asarray(np.argmax(predicted @ centroids.T, axis=1))


def _joined(
    questions: Float32[np.ndarray, "P D"], sources: Float32[np.ndarray, "P E"]
) -> Float32[np.ndarray, "P both"]:
    """Both vectors as one, so that a dot product is the mean of the two cosines."""
    both = np.concatenate([unit(questions), unit(sources)], axis=1) / np.sqrt(2.0)
    return np.asarray(both, np.float32)

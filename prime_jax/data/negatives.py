"""Hard negatives: passages that a search finds near the top and that are not the right answer.

Mining is positive-aware (arXiv 2407.15831): what scores nearly as high as the right answer may well be right
itself, so only passages a margin below it count.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float32, Int, Int64

from prime_jax.data.embedded import EMPTY, EmbeddedDataset, EmbeddedSplit
from prime_jax.retrieval.topk import ExactIndex

MOST = 10
DEPTH = 100
ROWS = 1024  # examples whose candidates are compared with their right answers at a time

Vectors = Float32[np.ndarray, "n E"]


def searches_of(
    data: EmbeddedDataset, split: EmbeddedSplit, predicted: Vectors | None = None
) -> dict[str, Vectors]:
    """What to search with: the queries, the first right answers, and the predictions where there are any."""
    first = np.array([ids[0] for ids in split.positives])
    searches = {"query": data.store[split.query_rows], "positive": data.store[data.corpus_rows[first]]}
    return searches if predicted is None else {**searches, "predicted": predicted}


def mine_negatives(
    searches: Mapping[str, Vectors],
    data: EmbeddedDataset,
    split: EmbeddedSplit,
    *,
    count: int,
    margin: float = 0.05,
    depth: int = DEPTH,
) -> Int64[np.ndarray, "n count"]:
    """Corpus rows of each example's hard negatives, the hardest first, -1 behind the last.

    Each search offers its best `depth` passages within the example's scope. A passage is taken if its score
    is below that of the example's lowest-scoring right answer, by `margin` of that score, and if its cosine
    to every right answer is at most `1 - margin`. The searches take turns: the first of each, the second of
    each, and so on.

    Args:
        searches: Unit vectors to search with, by name, a row per example.
        data: The passages.
        split: The examples. Their right answers and what they exclude are never negatives.
        count: Negatives per example, 1 to 10.
        margin: Relative distance below the right answer.
        depth: Passages that each search offers.
    """
    if not 1 <= count <= MOST:
        raise ValueError(f"count is {count}, but an example takes 1 to {MOST} mined negatives")
    corpus = data.corpus()
    depth = min(depth, len(corpus))
    never = [np.concatenate(pair) for pair in zip(split.positives, split.exclude, strict=True)]
    right = _padded(split.positives)
    offers = []
    index = ExactIndex(corpus, data.corpus_scope)
    for vectors in searches.values():
        scores, rows = index.search(vectors, depth, exclude=never, query_scope=split.scope)
        wrong = np.zeros(rows.shape, bool)
        for start in range(0, len(rows), ROWS):
            part = slice(start, start + ROWS)
            wrong[part] = _is_negative(vectors[part], scores[part], rows[part], right[part], corpus, margin)
        offers.append(np.where(wrong, rows, EMPTY))
    in_turns = np.stack(offers, axis=2).reshape(len(right), -1)  # rank by rank, search by search
    return _first_distinct(in_turns.astype(np.int64), count)


def context_negatives(data: EmbeddedDataset, split: EmbeddedSplit) -> Int64[np.ndarray, "n N"]:
    """Corpus rows of the turns that are passages themselves, -1 for the others.

    Turns that are right answers, or that the search leaves out for this example anyway, are no negatives.
    """
    order = np.argsort(data.corpus_rows, kind="stable")
    ordered = data.corpus_rows[order]
    at = np.minimum(np.searchsorted(ordered, split.context_rows), len(ordered) - 1)
    found = np.where((ordered[at] == split.context_rows) & (split.context_rows != EMPTY), order[at], EMPTY)
    for number, rows in enumerate(zip(split.positives, split.exclude, strict=True)):
        found[number, np.isin(found[number], np.concatenate(rows))] = EMPTY
    return found.astype(np.int64)


def _is_negative(
    vectors: Vectors,
    scores: Float32[np.ndarray, "n depth"],
    rows: Int[np.ndarray, "n depth"],
    right: Int64[np.ndarray, "n P"],
    corpus: Float32[np.ndarray, "M E"],
    margin: float,
) -> Bool[np.ndarray, "n depth"]:
    """Which candidates are far enough below every right answer, and far enough from it."""
    answers = corpus[np.maximum(right, 0)]
    known = right != EMPTY
    own = np.where(known, np.einsum("ne,npe->np", vectors, answers), np.inf).min(axis=1)
    below = scores <= (own - margin * np.abs(own))[:, None]
    cosine = np.einsum("nde,npe->ndp", corpus[np.maximum(rows, 0)], answers)
    apart = np.where(known[:, None, :], cosine, -1.0).max(axis=2) <= 1 - margin
    answer: Bool[np.ndarray, "n depth"] = (rows != EMPTY) & below & apart
    return answer


def _first_distinct(table: Int64[np.ndarray, "n candidates"], count: int) -> Int64[np.ndarray, "n count"]:
    """The first `count` different ids of each row, in order, -1 behind them."""
    order = np.argsort(table, axis=1, kind="stable")
    ordered = np.take_along_axis(table, order, axis=1)
    fresh = np.ones(table.shape, bool)
    np.put_along_axis(fresh, order[:, 1:], ordered[:, 1:] != ordered[:, :-1], axis=1)
    fresh &= table != EMPTY
    place = np.cumsum(fresh, axis=1) - 1
    chosen = np.full((len(table), count), EMPTY, np.int64)
    example, column = np.nonzero(fresh & (place < count))
    chosen[example, place[example, column]] = table[example, column]
    return chosen


def _padded(lists: tuple[Int64[np.ndarray, " _"], ...]) -> Int64[np.ndarray, "n P"]:
    width = max(map(len, lists))
    return np.stack([np.pad(ids, (0, width - len(ids)), constant_values=EMPTY) for ids in lists])

"""Hard negatives in four tiers, from nearly right to any: what a steered prediction must tell apart."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float32, Int32, Int64

from prime_jax.data.clusters import Clusters
from prime_jax.data.embedded import EMPTY, EmbeddedDataset, EmbeddedSplit
from prime_jax.data.steered import pairs_of
from prime_jax.errors import DataError
from prime_jax.progress import progress
from prime_jax.retrieval.topk import search

TIERS = ("in the target's cluster", "in the clusters nearest to it", "near the question", "random")
NEAR = 3  # clusters that count as near to the target's, but never more than half of the others

Rows = Int64[np.ndarray, " _"]


def near_clusters(centroids: Float32[np.ndarray, "C D"]) -> Int64[np.ndarray, "C near"]:
    """The clusters nearest to each one, the nearest first."""
    count = len(centroids)
    cosine = centroids @ centroids.T
    np.fill_diagonal(cosine, -np.inf)
    wanted = min(NEAR, count // 2)
    return np.argsort(-cosine, axis=1, kind="stable")[:, :wanted].astype(np.int64)


def tiered_negatives(
    data: EmbeddedDataset, split: str, clusters: Clusters, tiers: Sequence[int], *, seed: int
) -> Int32[np.ndarray, "pairs T"]:
    """Corpus rows of the hard negatives of each pair (example, right answer), -1 where a tier runs out.

    In the order of the tiers: passages of the target's cluster, those nearest to the target first; passages
    of the up to three clusters nearest to that one, again those nearest to the target; of all other clusters
    those of highest cosine with the question; random ones.

    None is a right answer of any example with the same question text, nor has the text of one; none is
    excluded by the example or of another scope, and no row holds a passage twice.

    Args:
        data: The passages and their scopes.
        split: Name of the split.
        clusters: Of the passages.
        tiers: How many of each tier.
        seed: Of the random ones.

    Raises:
        DataError: If the corpus has not more passages than a row has places.
    """
    if len(data.corpus_rows) <= sum(tiers):
        raise DataError(
            f"the corpus has {len(data.corpus_rows)} passages, too few for {sum(tiers)} hard negatives "
            "beside a right answer; give smaller --tiers"
        )
    part = data.splits[split]
    example, target = pairs_of(part)
    never = [np.asarray(ids, np.int64) for ids in _never(data, part)]
    near = near_clusters(clusters.centroids)
    cluster_of = clusters.assignment[target]
    ends = np.cumsum(tiers)
    table = np.full((len(target), ends[-1]), EMPTY, np.int32)
    with progress(f"hard negatives of {split}", len(target), "pairs") as advance:
        for cluster in np.unique(cluster_of):
            rows = np.flatnonzero(cluster_of == cluster)
            mine, scope = [never[number] for number in example[rows]], part.scope[example[rows]]
            answers = data.store[data.corpus_rows[target[rows]]]
            questions = data.store[part.query_rows[example[rows]]]
            others = np.setdiff1d(np.arange(len(near)), [cluster, *near[cluster]])
            searches = ((answers, cluster[None]), (answers, near[cluster]), (questions, others))
            for (vectors, among), count, end in zip(searches, tiers, ends, strict=False):
                found = _search(data, vectors, clusters.members(among), count, mine, scope)
                table[rows, end - count : end] = found
            advance(len(rows))
    random = np.random.default_rng([seed, *split.encode()])
    draws = _random(data, part, example, never, table[:, : ends[2]], tiers[3], random)
    for row, drawn in enumerate(draws):
        table[row, ends[2] : ends[2] + len(drawn)] = drawn
    return table


def _search(
    data: EmbeddedDataset,
    vectors: Float32[np.ndarray, "n D"],
    passages: Rows,
    count: int,
    never: Sequence[Rows],
    scope: Int32[np.ndarray, " n"],
) -> Int64[np.ndarray, "n count"]:
    """The nearest among some passages, as rows of the whole corpus."""
    if not count or not len(passages):
        return np.full((len(vectors), count), EMPTY, np.int64)
    place = np.full(len(data.corpus_rows), EMPTY, np.int64)
    place[passages] = np.arange(len(passages))
    hidden = [places[places != EMPTY] for places in (place[ids] for ids in never)]
    _, found = search(
        vectors,
        data.store.part(data.corpus_rows[passages]),
        count,
        exclude=hidden,
        query_scope=scope,
        corpus_scope=data.corpus_scope[passages],
    )
    return np.where(found == EMPTY, EMPTY, passages[found])


def _random(
    data: EmbeddedDataset,
    part: EmbeddedSplit,
    example: Rows,
    never: Sequence[Rows],
    taken: Int32[np.ndarray, "n t"],
    count: int,
    random: np.random.Generator,
) -> Iterator[Rows]:
    """For each pair up to `count` passages of its scope that it may have and does not have yet."""
    order = np.argsort(data.corpus_scope, kind="stable")
    ordered = data.corpus_scope[order]
    first, last = (np.searchsorted(ordered, part.scope, side=side) for side in ("left", "right"))
    for row, number in enumerate(example):
        pool = order[first[number] : last[number]]
        barred = np.concatenate([never[number], taken[row]])
        free = pool[:0]
        if len(pool) > 2 * (len(barred) + count):  # most of it is free: a few draws will do
            drawn = pool[random.integers(0, len(pool), 4 * count + 32)]
            drawn = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
            free = drawn[~np.isin(drawn, barred)]
        if len(free) < count:
            drawn = random.permutation(pool)
            free = drawn[~np.isin(drawn, barred)]
        yield free[:count]


def _never(data: EmbeddedDataset, part: EmbeddedSplit) -> Iterator[Rows]:
    """Per example what is no negative of it: what it excludes, and whatever answers the same question."""
    answers: dict[int, list[Rows]] = {}
    for row, right in zip(part.query_rows.tolist(), part.positives, strict=True):
        answers.setdefault(row, []).append(right)
    order = np.argsort(data.corpus_rows, kind="stable")
    ordered = data.corpus_rows[order]

    def alike(passages: Rows) -> Rows:
        """Passages and those with the same texts as they have."""
        stored = np.unique(data.corpus_rows[passages])
        first, last = (np.searchsorted(ordered, stored, side=side) for side in ("left", "right"))
        return np.concatenate([order[a:b] for a, b in zip(first, last, strict=True)])

    known = {row: alike(np.concatenate(lists)) for row, lists in answers.items()}
    for row, excluded in zip(part.query_rows.tolist(), part.exclude, strict=True):
        yield np.union1d(known[row], excluded).astype(np.int64)

"""How good a ranking is, query by query: P@k, R@k, MRR@10 and nDCG@10 as ir_measures (trec_eval) has them."""

from collections.abc import Sequence

import ir_measures
import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy import ndarray

from prime_jax.errors import DataError

_MEASURES = {
    "P@1": ir_measures.P @ 1,
    "P@5": ir_measures.P @ 5,
    "R@5": ir_measures.R @ 5,
    "R@10": ir_measures.R @ 10,
    "MRR@10": ir_measures.RR @ 10,
    "nDCG@10": ir_measures.nDCG @ 10,
}
METRICS = tuple(_MEASURES)
DEPTH = 10
"""How many results a ranking needs for these metrics."""


def ranking_metrics(
    indices: Int64[ndarray, "Q k"], positives: Sequence[ndarray]
) -> dict[str, Float64[ndarray, " Q"]]:
    """Every metric of `METRICS` for every query; the figure usually reported is its `np.mean`.

    Args:
        indices: Corpus rows returned for each query, best first, -1 where nothing was left to return;
            at least `DEPTH` columns, later ones are not looked at.
        positives: The right corpus rows of each query, at least one.

    Raises:
        DataError: If the lengths differ, there are fewer than `DEPTH` columns, a query has no positive, or a
            ranking returns a row twice or has a gap.
    """
    _check(indices, positives)
    # trec_eval sorts by score and breaks ties by document name: strictly falling scores keep our order.
    run = {
        str(query): {str(row): float(-rank) for rank, row in enumerate(found) if row >= 0}
        for query, found in enumerate(indices[:, :DEPTH].tolist())
    }
    qrels = {str(query): {str(row): 1 for row in rows.tolist()} for query, rows in enumerate(positives)}
    values = {name: np.zeros(len(indices)) for name in METRICS}
    if len(indices) == 0:
        return values
    name_of = {measure: name for name, measure in _MEASURES.items()}
    for result in ir_measures.iter_calc(list(name_of), qrels, run):
        values[name_of[result.measure]][int(result.query_id)] = result.value
    return values


def _check(indices: Int64[ndarray, "Q k"], positives: Sequence[ndarray]) -> None:
    if len(indices) != len(positives):
        raise DataError(f"metrics: {len(indices)} rankings for {len(positives)} lists of positives")
    if indices.shape[1] < DEPTH:
        raise DataError(f"metrics: rankings of {indices.shape[1]} rows, the metrics need {DEPTH}")
    for query, rows in enumerate(positives):
        if len(rows) == 0:
            raise DataError(f"metrics: query {query} has no positive")
    empty = indices < 0
    gaps = np.flatnonzero((empty[:, :-1] & ~empty[:, 1:]).any(axis=1))
    if len(gaps):
        raise DataError(f"metrics: the ranking of query {gaps[0]} has an empty place before a filled one")
    ordered = np.sort(indices, axis=1)
    repeated = np.flatnonzero(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1))
    if len(repeated):
        raise DataError(f"metrics: the ranking of query {repeated[0]} returns a row twice")


def is_positive(indices: Int64[ndarray, "*G Q k"], positives: Sequence[ndarray]) -> Bool[ndarray, "*G Q k"]:
    """Whether each returned row is one of its query's positives; leading axes are allowed."""
    table = np.full((len(positives), max(map(len, positives), default=0)), -2, np.int64)
    for query, rows in enumerate(positives):
        table[query, : len(rows)] = rows
    hits: Bool[ndarray, "*G Q k"] = (indices[..., None] == table[:, None, :]).any(axis=-1)
    return hits


def first_rank(indices: Int64[ndarray, "*G Q k"], positives: Sequence[ndarray]) -> Int64[ndarray, "*G Q"]:
    """Rank (from 1) of the first positive in each ranking, 0 where there is none; more axes may lead."""
    hits = is_positive(indices, positives)
    return np.where(hits.any(axis=-1), hits.argmax(axis=-1) + 1, 0)


def mean_reciprocal_rank(
    indices: Int64[ndarray, "G Q k"], positives: Sequence[ndarray]
) -> Float64[ndarray, " G"]:
    """MRR@k of each of several searches of one split (with k = 10 the mean of `ranking_metrics`' MRR@10)."""
    rank = first_rank(indices, positives)
    reciprocal: Float64[ndarray, " G"] = np.where(rank > 0, 1 / np.maximum(rank, 1), 0.0).mean(axis=-1)
    return reciprocal

"""What a mean over all queries hides: answers that were trained on, hubs, predictions that collapse."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int64, Shaped
from numpy import ndarray
from scipy import stats

from prime_jax.evaluate.significance import Comparison, compare
from prime_jax.train.validate import effective_rank

APART = ("P@5", "R@10", "MRR@10")
FEWEST = 10  # groups of queries that a comparison is made for


class Novelty(NamedTuple):
    """Queries by whether training has seen one of their right answers as a right answer.

    Attributes:
        unseen: True where it has not, `[Q]`.
        means: Mean of each metric of `APART`, by method and then by `unseen` or `seen`.
        significance: Of the prediction against each baseline on the unseen queries, by baseline and metric;
            empty where there are too few to compare.
    """

    unseen: Bool[ndarray, " Q"]
    means: Mapping[str, Mapping[str, Mapping[str, float]]]
    significance: Mapping[str, Mapping[str, Comparison]]


def novelty(
    metrics: Mapping[str, Mapping[str, ndarray]],
    fresh: Bool[ndarray, " Q"],
    ours: str,
    *,
    seed: int,
    groups: Shaped[ndarray, " Q"] | None,
) -> Novelty | None:
    """Report unseen and seen queries apart; None where all are of one kind, which the whole report is about.

    Args:
        metrics: Every metric for every query, `[Q]` each, by method.
        fresh: What `prime_jax.retrieval.novelty.unseen` found.
        ours: Name of the method that is compared with the others.
        seed: Of bootstrap and permutation test.
        groups: Which queries depend on each other (see `significance`).
    """
    if fresh.all() or not fresh.any():
        return None
    means = {
        method: {
            kind: {name: float(values[name][rows].mean()) for name in APART}
            for kind, rows in (("unseen", fresh), ("seen", ~fresh))
        }
        for method, values in metrics.items()
    }
    labels = (np.arange(len(fresh)) if groups is None else np.asarray(groups))[fresh]
    significance: dict[str, dict[str, Comparison]] = {}
    if len(np.unique(labels)) >= FEWEST:
        significance = {
            method: {
                name: compare(metrics[ours][name][fresh], values[name][fresh], seed=seed, groups=labels)
                for name in APART
            }
            for method, values in metrics.items()
            if method != ours
        }
    return Novelty(fresh, means, significance)


def hubness(indices: Int64[ndarray, "Q k"], passages: int) -> float:
    """How unevenly passages are returned: the skewness of how often each is among the first ten.

    0 is even; from about 2 on a few hubs are returned to everybody (Radovanovic et al. 2010).
    """
    first = indices[:, :10]
    counts = np.bincount(first[first >= 0], minlength=passages)
    return float(stats.skew(counts)) if counts.std() > 0 else 0.0


def gauges(
    indices: Mapping[str, Int64[ndarray, "Q k"]],
    predicted: Float32[ndarray, "Q E"],
    query: Float32[ndarray, "Q D"],
    right: Float32[ndarray, "Q E"],
    passages: int,
) -> dict[str, dict[str, float]]:
    """Hubness of the rankings of some methods, and in how many directions their vectors spread.

    Args:
        indices: Ranking of every query by method; -1 where nothing was left.
        predicted: The predictions.
        query: The queries.
        right: The first right answer of each query, as predictions search it.
        passages: How many passages there are.
    """
    return {
        "hubness": {name: hubness(rows, passages) for name, rows in indices.items()},
        "effective_rank": {
            "predicted": effective_rank(predicted),
            "query": effective_rank(query),
            "right answers": effective_rank(right),
        },
    }

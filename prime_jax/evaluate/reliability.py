"""Is the confidence what it says it is, and what is it good for?

A confidence of 0.7 is calibrated if seven of ten such predictions find a right passage among the first five.
It is useful if precision rises where only confident predictions are used and the others fall back to the
query.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32
from numpy import ndarray
from scipy.stats import rankdata

BINS = 10
FEWEST = 50  # queries in a bin; fewer would measure chance
DRAWS = 200
COVERAGE = np.linspace(0, 1, 21)


class Judged(NamedTuple):
    """What a predictor says of its predictions for a split (`prime_jax.predict.judging.Answer`).

    Attributes:
        confidence: Probability of a right passage among the first five, `[Q]`.
        guarded: The predictions behind the guard, `[Q, E]`; None where there can be none.
        trust: How much of each prediction is in `guarded`, `[Q]`.
        fallback: What the guard goes back to, in words.
    """

    confidence: Float32[ndarray, " Q"]
    guarded: Float32[ndarray, "Q E"] | None
    trust: Float32[ndarray, " Q"]
    fallback: str = "the query"


class Reliability(NamedTuple):
    """How good a confidence is.

    Attributes:
        said: Mean confidence of each bin of equally many queries, `[b]`.
        found: Share of them with a right passage among the first five, `[b]`.
        counts: Queries of each bin, `[b]`.
        ece: Expected calibration error: mean of |said - found| over the queries (Naeini et al. 2015).
        ece_by_chance: What a perfectly calibrated confidence would score on as many queries.
        brier: Mean squared difference of the confidence and what happened.
        auc: Probability that a query with a right passage has a higher confidence than one without; None
            where all or none have one.
        selective: By metric its mean when the most confident share of `COVERAGE` uses the prediction and the
            others the query, `[21]`.
        confident: By metric its mean over that share alone, nan for none, `[21]`.
    """

    said: Float[ndarray, " b"]
    found: Float[ndarray, " b"]
    counts: ndarray
    ece: float
    ece_by_chance: float
    brier: float
    auc: float | None
    selective: Mapping[str, ndarray]
    confident: Mapping[str, ndarray]


def reliability(
    confidence: Float32[ndarray, " Q"],
    predicted: Mapping[str, ndarray],
    query: Mapping[str, ndarray],
    metrics: tuple[str, ...],
    *,
    seed: int,
) -> Reliability:
    """Compare confidences with what was found.

    Args:
        confidence: What was said of each query.
        predicted: Metrics of the predictions for each query.
        query: Metrics of the plain query.
        metrics: Which of them the selective curve shows.
        seed: Of `ece_by_chance`.
    """
    right = predicted["P@5"] > 0
    bins = np.array_split(np.argsort(confidence, kind="stable"), _bins(len(confidence)))
    random = np.random.default_rng(seed)
    drawn = random.random((DRAWS, len(confidence))) < confidence
    order = np.argsort(-confidence, kind="stable")
    chosen = [order[: round(share * len(order))] for share in COVERAGE]
    return Reliability(
        said=np.array([confidence[rows].mean() for rows in bins]),
        found=np.array([right[rows].mean() for rows in bins]),
        counts=np.array([len(rows) for rows in bins]),
        ece=calibration_error(confidence, right),
        ece_by_chance=float(np.mean([calibration_error(confidence, one) for one in drawn])),
        brier=float(np.mean((confidence - right) ** 2)),
        auc=_auc(confidence, right),
        selective={
            name: np.array([_mixed(predicted[name], query[name], rows) for rows in chosen])
            for name in metrics
        },
        confident={
            name: np.array([predicted[name][rows].mean() if len(rows) else np.nan for rows in chosen])
            for name in metrics
        },
    )


def calibration_error(confidence: Float32[ndarray, " Q"], right: Bool[ndarray, " Q"]) -> float:
    """Expected calibration error over bins of equally many queries, ten where there are enough."""
    bins = np.array_split(np.argsort(confidence, kind="stable"), _bins(len(confidence)))
    gaps = [len(rows) * abs(confidence[rows].mean() - right[rows].mean()) for rows in bins]
    return float(np.sum(gaps) / len(confidence))


def _bins(queries: int) -> int:
    return max(1, min(BINS, queries // FEWEST))


def _mixed(predicted: ndarray, query: ndarray, chosen: ndarray) -> float:
    mixed = query.astype(float)
    mixed[chosen] = predicted[chosen]
    return float(mixed.mean())


def _auc(confidence: ndarray, right: ndarray) -> float | None:
    hits = int(right.sum())
    if hits in (0, len(right)):
        return None
    above = rankdata(confidence)[right].sum() - hits * (hits + 1) / 2
    return float(above / (hits * (len(right) - hits)))

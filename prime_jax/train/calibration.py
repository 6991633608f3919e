"""Fitting a `Confidence` on the validation split, each time a checkpoint is scored.

The probability is a logistic regression of few features, fitted on whether dev queries found a right passage
among their first five; its ridge is the one under which conversations left out are foretold best. The guard's
ramp comes from how near dev queries lie to the centres of the training queries; the guard only ever lets
predictions through when dev shows that they beat what it goes back to (one-sided test of the reciprocal rank,
whole conversations as units, p < 0.01).
"""

import warnings

import numpy as np
from jaxtyping import Bool, Float, Shaped
from numpy import ndarray
from scipy.cluster.vq import kmeans2
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import ttest_1samp

from prime_jax.models.confidence import Confidence, Vectors, features, nearest
from prime_jax.retrieval.mix import PLAIN_QUERY, RecencyMix
from prime_jax.retrieval.vectors import unit

CENTRES = 64
QUERIES_PER_CENTRE = 10  # fewer could be told apart in the file
RAMP = (0.05, 0.2)  # shares of dev queries that are not trusted at all, and not fully
RIDGES = (1.0, 5.0, 25.0, 125.0, 625.0)  # validation splits are often small
CAREFUL = 25.0  # the ridge where there are too few groups to leave some out
FOLDS = 5
LEVEL = 0.01
FEWEST_GROUPS = 10


def centres_of(vectors: Vectors, seed: int = 0) -> Float[ndarray, "K D"]:
    """Unit-norm centres of vectors (k-means++), each the mean of ten or more different ones, or of all.

    Args:
        vectors: Any length, `[n, D]`.
        seed: Of the first centres.
    """
    random = np.random.default_rng(seed)
    directions = np.unique(unit(vectors), axis=0).astype(np.float64)  # a text asked twice counts once
    count = max(1, min(CENTRES, len(directions) // (2 * QUERIES_PER_CENTRE)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a cluster that ends up empty is left out below
        centres, member = kmeans2(directions, count, minit="++", rng=random)
    large = np.bincount(member, minlength=count) >= QUERIES_PER_CENTRE
    kept = centres[large] if large.any() else directions.mean(axis=0, keepdims=True)
    return unit(kept)


def fit(
    context: Float[ndarray, "B N D"],
    mask: Bool[ndarray, "B N"],
    query: Vectors,
    predicted: Float[ndarray, "B E"],
    *,
    hit: Bool[ndarray, " B"],
    gain: Float[ndarray, " B"],
    groups: Shaped[ndarray, " B"] | None = None,
    query_centres: Float[ndarray, "K D"],
    answer_centres: Float[ndarray, "L E"],
    fallback: RecencyMix = PLAIN_QUERY,
) -> Confidence:
    """Fit a judgement of predictions on validation queries.

    Args:
        context: Their turns, oldest first.
        mask: True where a turn is real.
        query: The queries.
        predicted: The predictions, unit norm.
        hit: Whether each found a right passage among its first five.
        gain: Reciprocal rank of each prediction less that of what the guard falls back to.
        groups: Labels of queries that depend on each other, such as those of one conversation.
        query_centres: Of training queries (`centres_of`).
        answer_centres: Of the predictions for them.
        fallback: What the guard falls back to.
    """
    max_turns = max(1, mask.shape[1])
    values = features(context, mask, query, predicted, query_centres, answer_centres, max_turns).astype(
        np.float64
    )
    mean, scale = values.mean(axis=0), values.std(axis=0)
    scale = np.where(scale > 1e-6, scale, 1.0)
    lowest, highest = values.min(axis=0), values.max(axis=0)
    values, right = (values - mean) / scale, hit.astype(np.float64)
    weights, bias = _logistic(values, right, _best_ridge(values, right, groups))
    low, high = np.quantile(nearest(query, query_centres), RAMP)
    return Confidence(
        weights=weights.astype(np.float32),
        bias=np.asarray([bias], np.float32),
        mean=mean.astype(np.float32),
        scale=scale.astype(np.float32),
        low=lowest.astype(np.float32),
        high=highest.astype(np.float32),
        query_centres=query_centres,
        answer_centres=answer_centres,
        ramp=np.asarray([min(low, high - 1e-3), high], np.float32),
        strength=np.asarray([_surely_positive(gain, groups)], np.float32),
        max_turns=np.asarray([max_turns], np.float32),
        fallback=np.asarray(fallback, np.float32),
    )


def _surely_positive(gain: Float[ndarray, " B"], groups: Shaped[ndarray, " B"] | None) -> bool:
    """Whether a gain is more than chance (one-sided t-test of what groups of queries gain in all)."""
    if groups is not None:
        labels = np.unique(groups, return_inverse=True)[1]
        if labels.max() + 1 >= FEWEST_GROUPS:  # fewer say nothing, as when one phrase links all conversations
            gain = np.bincount(labels, gain)
    if len(gain) < 2 or gain.std() == 0:
        return False
    return bool(ttest_1samp(gain, 0.0, alternative="greater").pvalue < LEVEL)


def _best_ridge(
    values: Float[ndarray, "B F"], hit: Float[ndarray, " B"], groups: Shaped[ndarray, " B"] | None
) -> float:
    """The ridge whose fits say the most likely things of groups that they have not seen."""
    labels = np.arange(len(hit)) if groups is None else np.unique(groups, return_inverse=True)[1]
    count = int(labels.max()) + 1
    if count < FEWEST_GROUPS:
        return CAREFUL
    fold = np.random.default_rng(0).permutation(count)[labels] % FOLDS

    def surprise(ridge: float) -> float:
        total = 0.0
        for number in range(FOLDS):
            fitted, rest = fold != number, fold == number
            weights, bias = _logistic(values[fitted], hit[fitted], ridge)
            logits = values[rest] @ weights + bias
            total += float(np.sum(np.logaddexp(0, logits) - hit[rest] * logits))
        return total

    return min(reversed(RIDGES), key=surprise)


def _logistic(
    values: Float[ndarray, "B F"], hit: Float[ndarray, " B"], ridge: float
) -> tuple[ndarray, float]:
    """Weights and offset of a ridge logistic regression; half a hit and half a miss keep it off 0 and 1."""
    count = values.shape[1]

    def loss(theta: ndarray) -> tuple[float, ndarray]:
        logits = values @ theta[:count] + theta[count]
        ends = np.logaddexp(0, logits) - hit * logits
        smooth = 0.5 * np.logaddexp(0, theta[count]) + 0.5 * np.logaddexp(0, -theta[count])
        error = expit(logits) - hit
        slope = np.append(values.T @ error + ridge * theta[:count], error.sum() + expit(theta[count]) - 0.5)
        return ends.sum() + smooth + 0.5 * ridge * np.sum(theta[:count] ** 2), slope

    found = minimize(loss, np.zeros(count + 1), jac=True, method="L-BFGS-B").x
    return found[:count], float(found[count])

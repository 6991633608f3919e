"""Which cluster a question's answer lies in, predicted from the question alone: ridge regression.

Least squares from the question's embedding (with an intercept) to the one-hot cluster of the answer, in
closed form. What is predicted for the rows it was fitted on comes from cross-fitting: each fold by the fit on
the other folds, so that no row's prediction has seen its own label, nor that of a row in its group.
"""

from collections.abc import Iterator
from itertools import combinations_with_replacement
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Int32, Int64

from prime_jax.errors import DataError
from prime_jax.retrieval.topk import Rows

FOLDS = 5
STRENGTHS = (0.003, 0.03, 0.3, 3.0)  # of the penalty, in units of the mean eigenvalue of X'X
ROWS = 4096


class CrossFitted(NamedTuple):
    """What was predicted for the rows of the fit, and what predicts other rows.

    Attributes:
        predicted: Cluster of each row, by the fit on the folds that it is not in, `[n]`.
        weights: Of the fit on all rows; the last row is the intercept, `[D + 1, C]`.
        strength: The penalty of that fit.
        accuracy: Share of `predicted` that is right.
    """

    predicted: Int32[np.ndarray, " n"]
    weights: Float[np.ndarray, "d C"]
    strength: float
    accuracy: float


def folds_of(groups: Int64[np.ndarray, " n"], *, seed: int, count: int = FOLDS) -> Int64[np.ndarray, " n"]:
    """A fold for each row, the same for all rows of a group, of sizes as even as the groups allow.

    Args:
        groups: Group of each row, 0 to G - 1.
        seed: Of the order among groups of one size.
        count: Folds at most; there are no more than groups.

    Raises:
        DataError: If there are fewer than three groups.
    """
    sizes = np.bincount(groups)
    count = min(count, len(sizes))
    if count < 3:
        raise DataError(
            f"train: has {count} groups of examples without a common question or turn, too few to predict a "
            "cluster without having seen its label"
        )
    shuffled = np.random.default_rng(seed).permutation(len(sizes))
    held = np.zeros(count, np.int64)
    fold_of = np.empty(len(sizes), np.int64)
    for group in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
        fold_of[group] = np.argmin(held)
        held[fold_of[group]] += sizes[group]
    folds: Int64[np.ndarray, " n"] = fold_of[groups]
    return folds


def cross_fit(
    questions: Rows,
    labels: Int32[np.ndarray, " n"],
    folds: Int64[np.ndarray, " n"],
    clusters: int,
    strengths: tuple[float, ...] = STRENGTHS,
) -> CrossFitted:
    """Fit and cross-fit, each with the strength that is right most often on rows left out of its fits.

    For the rows of one fold the strength, too, is chosen without their labels: by how well the other folds
    predict one another (nested cross-validation).

    Args:
        questions: `[n, D]`; read part by part.
        labels: Cluster of each row's answer.
        folds: Fold of each row, 0 to F - 1 with F at least 3; every fold has one.
        clusters: C.
        strengths: What to choose from.
    """
    count, width = int(folds.max()) + 1, questions.shape[1] + 1
    gram = np.zeros((count, width, width))
    moment = np.zeros((count, width, clusters))
    for part, features in _features(questions):
        hot = np.eye(clusters)[labels[part]]
        for fold in np.unique(folds[part]):
            mine = folds[part] == fold
            gram[fold] += features[mine].T @ features[mine]
            moment[fold] += features[mine].T @ hot[mine]

    def fit(*without: int) -> list[Float[np.ndarray, "d C"]]:
        """With each strength, on all folds but these."""
        kept = [fold for fold in range(count) if fold not in without]
        return [_solve(gram[kept].sum(axis=0), moment[kept].sum(axis=0), one) for one in strengths]

    # A fit without two folds predicts either, for the sake of the other one's choice.
    fits = {pair: fit(*pair) for pair in combinations_with_replacement(range(count), 2)}
    right = np.zeros((count, len(strengths), count))  # [fold that is not looked at, strength, fold predicted]
    predicted = np.empty((len(strengths), len(labels)), np.int32)
    for part, features in _features(questions):
        for fold in np.unique(folds[part]).tolist():
            rows = part.start + np.flatnonzero(folds[part] == fold)
            for other in range(count):
                weights = fits[min(fold, other), max(fold, other)]
                found = np.stack([np.argmax(features[rows - part.start] @ one, axis=1) for one in weights])
                right[other, :, fold] += (found == labels[rows]).sum(axis=1)
                if other == fold:
                    predicted[:, rows] = found
    own = np.einsum("fsf->sf", right)
    chosen = np.array([np.argmax(np.delete(right[fold], fold, axis=1).sum(axis=1)) for fold in range(count)])
    best = int(np.argmax(own.sum(axis=1)))
    mine = predicted[chosen[folds], np.arange(len(labels))]
    return CrossFitted(mine, fit()[best], strengths[best], share_right(mine, labels))


def predict(weights: Float[np.ndarray, "d C"], questions: Rows) -> Int32[np.ndarray, " n"]:
    """The most likely cluster of each question's answer."""
    found = np.empty(len(questions), np.int32)
    for part, features in _features(questions):
        found[part] = np.argmax(features @ weights, axis=1)
    return found


def _features(questions: Rows) -> Iterator[tuple[slice, Float[np.ndarray, "rows d"]]]:
    """Some questions at a time, with a one behind for the intercept."""
    for start in range(0, len(questions), ROWS):
        rows = np.asarray(questions[start : start + ROWS], np.float64)
        yield slice(start, start + len(rows)), np.concatenate([rows, np.ones((len(rows), 1))], axis=1)


def _solve(
    gram: Float[np.ndarray, "d d"], moment: Float[np.ndarray, "d C"], strength: float
) -> Float[np.ndarray, "d C"]:
    """Ridge regression from its normal equations; the intercept, which comes last, is not penalised."""
    inputs = len(gram) - 1
    penalty = np.full(len(gram), strength * np.trace(gram[:inputs, :inputs]) / inputs)
    penalty[-1] = 0
    solution: Float[np.ndarray, "d C"] = np.linalg.solve(gram + np.diag(penalty), moment)
    return solution


def share_right(predicted: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> float:
    """How often a cluster was predicted right."""
    return float(np.mean(predicted == labels))

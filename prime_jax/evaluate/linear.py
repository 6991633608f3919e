"""Linear baselines: what ridge regression fitted on train can do in place of the model."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from prime_jax.evaluate.arrays import Corpus, Split, mean_turn
from prime_jax.evaluate.baselines import Baseline, Settings
from prime_jax.retrieval.mix import ages, real_turns
from prime_jax.retrieval.vectors import unit

_PENALTIES = (1e4, 3e3, 1e3, 300.0, 100.0, 30.0, 10.0, 3.0, 1.0, 0.1, 0.01)  # much shrinkage is simpler


def ridge(train: Split, corpus: Corpus) -> Baseline:
    """A linear map of the query to the passage."""
    return _linear("ridge", train, corpus)


def ridge_context(train: Split, corpus: Corpus) -> Baseline:
    """A linear map of query, mean turn and last turn: the inputs the model has, without its layers."""
    return _linear("ridge_context", train, corpus)


def linear_weights(name: str, settings: Settings, train: Split, corpus: Corpus) -> tuple[ndarray, ndarray]:
    """The map that a baseline of this module is with these settings: kernel `[D, E]` and bias `[E]`.

    With the setting `residual` it gives what is added to the unit-norm query.
    """
    weight, bias = _fitted(name, train, corpus)(settings["penalty"])
    half = slice(bias.shape[0] // 2, None) if settings["residual"] else slice(bias.shape[0] // 2)
    return weight[:, half], bias[half]


def ridge_solver(
    inputs: Float[ndarray, "T D"], targets: Float[ndarray, "T E"]
) -> Callable[[float], tuple[ndarray, ndarray]]:
    """Ridge regression with a bias that is not penalised; one eigendecomposition serves every penalty.

    Returns:
        penalty -> weight `[D, E]` and bias `[E]` that minimise |targets - inputs W - b|^2 + penalty |W|^2.
    """
    inputs, targets = inputs.astype(np.float64), targets.astype(np.float64)
    inputs_mean, targets_mean = inputs.mean(axis=0), targets.mean(axis=0)
    centred = inputs - inputs_mean
    values, vectors = np.linalg.eigh(centred.T @ centred)
    projected = vectors.T @ (centred.T @ (targets - targets_mean))

    def solve(penalty: float) -> tuple[ndarray, ndarray]:
        weight = vectors @ (projected / (np.maximum(values, 0) + penalty)[:, None])
        return weight, targets_mean - inputs_mean @ weight

    return solve


def _features(name: str, split: Split) -> ndarray:
    """What a map takes: the query, or query, mean turn and last turn side by side."""
    if name == "ridge":
        return unit(split.query)
    is_last = split.mask & (ages(split.mask) == 0)
    last = (real_turns(split.context, split.mask) * is_last[..., None]).sum(axis=1)
    return np.concatenate([unit(split.query), mean_turn(split), last], axis=1)


def _fitted(name: str, train: Split, corpus: Corpus) -> Callable[[float], tuple[ndarray, ndarray]]:
    """Ridge regression to the mean of the positives and, side by side, to what they add to the query."""
    rows = np.concatenate(train.positives)
    owner = np.repeat(np.arange(len(train.query)), [len(rows) for rows in train.positives])
    target = np.zeros((len(train.query), corpus.embeddings.shape[1]), np.float32)
    np.add.at(target, owner, unit(corpus.embeddings[rows]))
    target = unit(target)
    both = np.concatenate([target, target - unit(train.query)], axis=1)
    return ridge_solver(_features(name, train), both)


def _linear(name: str, train: Split, corpus: Corpus) -> Baseline:
    """Ridge regression to the mean of the positives, or to what they add to the query (`residual`)."""
    solve = _fitted(name, train, corpus)

    def prepare(split: Split) -> Callable[[Settings], ndarray]:
        given, base = _features(name, split).astype(np.float64), unit(split.query)

        def build(settings: Settings) -> ndarray:
            weight, bias = solve(settings["penalty"])
            plain, added = np.split(given @ weight + bias, 2, axis=1)
            return unit(base + added) if settings["residual"] else unit(plain)

        return build

    grid: list[Settings] = [
        {"residual": residual, "penalty": penalty} for residual in (True, False) for penalty in _PENALTIES
    ]
    return Baseline(name, grid, prepare)

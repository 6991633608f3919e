"""Baselines that deserve the name: each tuned on dev over its whole grid, then applied unchanged to test.

A baseline turns a split into query vectors; everything is searched the same way, by inner product with the
corpus under the split's exclusions and scopes. The setting with the largest MRR@10 on dev wins; of equal
settings the simpler one, which stands earlier in the grid.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int64
from numpy import ndarray

from prime_jax.errors import DataError
from prime_jax.evaluate.arrays import Corpus, Split, ages, mean_turn, real_turns, retrieve
from prime_jax.retrieval.metrics import DEPTH, first_rank
from prime_jax.retrieval.vectors import unit

Settings = dict[str, float | int | bool]
_ROWS_PER_SEARCH = (
    65_536  # query vectors of a grid searched at once; bounds memory to about 100 MB at E = 384
)


class Baseline(NamedTuple):
    """A family of untrained or linear queries.

    Attributes:
        name: Name in the report.
        grid: Every setting that is tried, the simplest first.
        prepare: Does what all settings share for a split and returns the function settings -> vectors
            `[Q, E]`.
    """

    name: str
    grid: Sequence[Settings]
    prepare: Callable[[Split], Callable[[Settings], ndarray]]


def tune(baseline: Baseline, dev: Split, corpus: Corpus) -> tuple[Settings, float]:
    """The setting of the grid with the largest MRR@10 on dev, and that MRR@10."""
    build = baseline.prepare(dev)
    at_once = max(1, _ROWS_PER_SEARCH // max(1, len(dev.query)))
    scores: list[float] = []
    for start in range(0, len(baseline.grid), at_once):
        grid = baseline.grid[start : start + at_once]
        copies = len(grid)
        tiled = dev._replace(
            exclude=None if dev.exclude is None else list(dev.exclude) * copies,
            scope=None if dev.scope is None else np.tile(dev.scope, copies),
        )
        found = retrieve(np.concatenate([build(settings) for settings in grid]), tiled, corpus, DEPTH)[1]
        scores += mean_reciprocal_rank(found.reshape(copies, -1, DEPTH), dev.positives).tolist()
    best = int(np.argmax(np.round(scores, 12)))
    return baseline.grid[best], scores[best]


def mean_reciprocal_rank(
    indices: Int64[ndarray, "G Q k"], positives: Sequence[ndarray]
) -> Float[ndarray, " G"]:
    """MRR@k of each of several searches of one split (with k = 10 the mean of `ranking_metrics`' MRR@10)."""
    rank = first_rank(indices, positives)
    reciprocal: Float[ndarray, " G"] = np.where(rank > 0, 1 / np.maximum(rank, 1), 0.0).mean(axis=-1)
    return reciprocal


def query() -> Baseline:
    """The plain query."""
    return Baseline("query", [{}], lambda split: lambda settings: unit(split.query))


def mean_context() -> Baseline:
    """Query + weight * mean of the turns."""
    weights = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.25, 1.5, 2, 3, 5, 10)

    def prepare(split: Split) -> Callable[[Settings], ndarray]:
        base, mean = unit(split.query), mean_turn(split)
        return lambda settings: unit(base + settings["weight"] * mean)

    return Baseline("mean_context", [{"weight": float(weight)} for weight in weights], prepare)


def recency_mix() -> Baseline:
    """Query + weight * sum of decay^age * turn, where the last turn has age 0."""
    weights, decays = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0, 1.5, 2.5), (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    grid: list[Settings] = [{"weight": 0.0, "decay": 0.0}]
    grid += [{"weight": weight, "decay": decay} for decay, weight in itertools.product(decays, weights)]

    def prepare(split: Split) -> Callable[[Settings], ndarray]:
        base, turns = unit(split.query), real_turns(split)
        age = ages(split)

        def build(settings: Settings) -> ndarray:
            weight = np.float32(settings["weight"]) * np.float32(settings["decay"]) ** age.astype(np.float32)
            return unit(base + np.einsum("qn,qnd->qd", weight, turns))

        return build

    return Baseline("recency_mix", grid, prepare)


def conversation_text() -> Baseline:
    """The encoded text of the query followed by the turns, the newest first, + weight * query."""

    def prepare(split: Split) -> Callable[[Settings], ndarray]:
        if split.conversation is None:
            raise DataError("conversation_text: the split has no encoded text of its conversations")
        base, whole = unit(split.query), unit(split.conversation)
        return lambda settings: unit(whole + settings["weight"] * base)

    weights = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
    return Baseline("conversation_text", [{"weight": weight} for weight in weights], prepare)


def last_turn_concat() -> Baseline:
    """The encoded text of the last turn followed by the query."""

    def prepare(split: Split) -> Callable[[Settings], ndarray]:
        if split.last_turn is None:
            raise DataError("last_turn_concat: the split has no encoded 'last turn + query'")
        vectors = unit(split.last_turn)
        return lambda settings: vectors

    return Baseline("last_turn_concat", [{}], prepare)


FEEDBACK_DEPTHS = (1, 2, 3, 5, 10, 20)


def average_feedback(corpus: Corpus) -> Baseline:
    """Vector pseudo relevance feedback by averaging: mean of the query and the first k passages it returns.

    Li et al. 2021 (arXiv 2108.11044), "Average".
    """
    grid: list[Settings] = [{"k": k} for k in (0, *FEEDBACK_DEPTHS)]

    def prepare(split: Split) -> Callable[[Settings], ndarray]:
        base, sums, counts = _fed_back(split, corpus)
        return lambda settings: unit((base + sums[int(settings["k"])]) / (1 + counts[int(settings["k"])]))

    return Baseline("average_prf", grid, prepare)


def rocchio(corpus: Corpus) -> Baseline:
    """Pseudo relevance feedback: query + beta * mean of the k passages that a first search returns.

    Rocchio (1971) without the non-relevant term, as nothing is judged here.
    """
    betas = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5)
    grid: list[Settings] = [{"k": 0, "beta": 0.0}]
    grid += [{"k": k, "beta": beta} for k, beta in itertools.product(FEEDBACK_DEPTHS, betas)]

    def prepare(split: Split) -> Callable[[Settings], ndarray]:
        base, sums, counts = _fed_back(split, corpus)

        def build(settings: Settings) -> ndarray:
            k = int(settings["k"])
            return unit(base + settings["beta"] * sums[k] / np.maximum(counts[k], 1))

        return build

    return Baseline("rocchio", grid, prepare)


def _fed_back(split: Split, corpus: Corpus) -> tuple[ndarray, dict[int, ndarray], dict[int, ndarray]]:
    """Unit-norm queries, and by k the sum and the number of the first k passages that they return."""
    base = unit(split.query)
    first = retrieve(base, split, corpus, max(FEEDBACK_DEPTHS))[1]
    total, count = np.zeros_like(base), np.zeros((len(base), 1), np.float32)
    sums, counts = {0: total}, {0: count}
    for rank in range(max(FEEDBACK_DEPTHS)):
        real = first[:, rank, None] >= 0
        total = total + np.where(real, corpus.embeddings[np.maximum(first[:, rank], 0)], 0)
        count = count + real
        sums[rank + 1], counts[rank + 1] = total, count
    return base, sums, counts

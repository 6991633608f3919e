"""Baselines that deserve the name: each tuned on dev over its whole grid, then applied unchanged to test.

A baseline turns a split into query vectors; everything is searched the same way, by inner product with the
corpus under the split's exclusions and scopes. The setting with the largest MRR@10 on dev wins; of equal
settings the simpler one, which stands earlier in the grid.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from prime_jax.errors import DataError
from prime_jax.evaluate.arrays import Corpus, Split, mean_turn, retrieve
from prime_jax.retrieval.metrics import DEPTH
from prime_jax.retrieval.mix import MIXES, RecencyMix, mixing
from prime_jax.retrieval.tuning import best_setting
from prime_jax.retrieval.vectors import unit

Settings = dict[str, float | int | bool]


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

    def search(vectors: ndarray, copies: int) -> ndarray:
        tiled = dev._replace(
            exclude=None if dev.exclude is None else list(dev.exclude) * copies,
            scope=None if dev.scope is None else np.tile(dev.scope, copies),
        )
        return retrieve(vectors, tiled, corpus, DEPTH)[1]

    return best_setting(baseline.grid, baseline.prepare(dev), search, dev.positives)


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

    def prepare(split: Split) -> Callable[[Settings], ndarray]:
        mixed = mixing(split.context, split.mask, split.query)
        return lambda settings: mixed(RecencyMix(settings["weight"], settings["decay"]))

    return Baseline("recency_mix", [mix._asdict() for mix in MIXES], prepare)


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

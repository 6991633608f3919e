"""The comparison itself: the predicted embedding beside tuned baselines, with intervals and significance."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32, Shaped
from numpy import ndarray

from prime_jax.errors import DataError
from prime_jax.evaluate.arrays import Corpus, Split, retrieve
from prime_jax.evaluate.baselines import (
    Baseline,
    Settings,
    average_feedback,
    conversation_text,
    last_turn_concat,
    mean_context,
    query,
    recency_mix,
    rocchio,
    tune,
)
from prime_jax.evaluate.chance import chance
from prime_jax.evaluate.gauges import Novelty, gauges, novelty
from prime_jax.evaluate.linear import ridge, ridge_context
from prime_jax.evaluate.reliability import Judged, Reliability, reliability
from prime_jax.evaluate.significance import Comparison, compare, interval
from prime_jax.progress import progress
from prime_jax.retrieval.metrics import ranking_metrics
from prime_jax.retrieval.novelty import unseen

COMPARED = ("P@5", "R@10", "MRR@10", "nDCG@10")
"""The metrics with intervals and significance."""
DEPTH = 100
"""How many results of each query are kept, for run files and the found-within-k curve."""
PREDICTED = "predicted"


@dataclass(frozen=True)
class Method:
    """One way of searching: its ranking of every query and what that is worth.

    Attributes:
        scores: `[Q, DEPTH]`.
        indices: Corpus rows, best first, -1 where nothing was left, `[Q, DEPTH]`.
        metrics: Every metric for every query, `[Q]` each.
        intervals: The 95% bootstrap interval of the mean of each of `COMPARED`.
        settings: The setting tuned on dev; empty where there is nothing to tune.
        tried: How many settings were tried on dev.
        dev_mrr: MRR@10 on dev of the chosen setting; None for the prediction, which is not tuned here.
    """

    scores: ndarray
    indices: ndarray
    metrics: Mapping[str, ndarray]
    intervals: Mapping[str, tuple[float, float]]
    settings: Settings
    tried: int = 0
    dev_mrr: float | None = None

    def mean(self, metric: str) -> float:
        """Mean of a metric over the queries."""
        return float(self.metrics[metric].mean())


@dataclass(frozen=True)
class Evaluation:
    """Everything a report says, before it is written down.

    Attributes:
        split: Name of the split that was measured.
        test: Its arrays.
        corpus: Number of passages.
        methods: By name, the baselines first, `PREDICTED` last.
        significance: Of the prediction against each baseline, by baseline and metric.
        chance: Metrics of a random ranking.
        groups: How many independent groups the queries form.
        seed: Seed of the bootstrap and the permutation test.
        novelty: Queries with unseen and with seen right answers apart; None where all are of one kind.
        gauges: Hubness of rankings and effective rank of vectors (`prime_jax.evaluate.gauges.gauges`).
        reliability: How good the confidence is; None where the model carries none.
        guard: Mean of each of `COMPARED` for the predictions behind the guard, their mean `trust`, and
            `fallback`, what it goes back to in words; None where there is no guard.
        ablation: Mean of each of `COMPARED` with a part of the model taken away, by part; empty where that
            was not asked for.
    """

    split: str
    test: Split
    corpus: int
    methods: Mapping[str, Method]
    significance: Mapping[str, Mapping[str, Comparison]]
    chance: Mapping[str, float]
    groups: int
    seed: int
    novelty: Novelty | None
    gauges: Mapping[str, Mapping[str, float]]
    reliability: Reliability | None = None
    guard: Mapping[str, Any] | None = None
    ablation: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def best_baseline(self) -> str:
        """The baseline with the largest MRR@10 on the measured split: the strongest opponent."""
        return max((name for name in self.methods if name != PREDICTED), key=self._mrr)

    def _mrr(self, name: str) -> float:
        return self.methods[name].mean("MRR@10")


def baselines(train: Split, dev: Split, corpus: Corpus) -> list[Baseline]:
    """Every baseline that the data allows.

    `last_turn_concat` needs `dev.last_turn`, `conversation_text` needs `dev.conversation`.

    Raises:
        DataError: If queries and passages differ in dimension, so that nothing untrained can compare them.
    """
    if dev.query.shape[1] != corpus.embeddings.shape[1]:
        raise DataError(
            f"baselines: queries have {dev.query.shape[1]} dimensions, "
            f"passages {corpus.embeddings.shape[1]}; a baseline needs both in one space"
        )
    some = [query(), mean_context(), recency_mix(), average_feedback(corpus), rocchio(corpus)]
    if dev.last_turn is not None:
        some.append(last_turn_concat())
    if dev.conversation is not None:
        some.append(conversation_text())
    return [*some, ridge(train, corpus), ridge_context(train, corpus)]


def evaluate_methods(
    split: str,
    test: Split,
    predicted: Float32[ndarray, "Q E"],
    *,
    train: Split,
    dev: Split,
    corpus: Corpus,
    seed: int,
    groups: Shaped[ndarray, " Q"] | None = None,
    memory: Corpus | None = None,
    judged: Judged | None = None,
    ablated: Mapping[str, ndarray] | None = None,
) -> Evaluation:
    """Measure the prediction and every baseline on `test`.

    Args:
        split: Name of the split `test` is.
        test: The queries to measure on.
        predicted: The model's embedding for each query of `test`.
        train: Where the linear baselines are fitted.
        dev: Where every baseline is tuned for MRR@10.
        corpus: The passages.
        seed: Seed of the bootstrap and the permutation test.
        groups: Which queries of `test` depend on each other (see `significance`).
        memory: The passages as the prediction searches them, where that is not as they are encoded
            (`Predictor.map_memory`); baselines search `corpus`.
        judged: What the predictor says of its predictions.
        ablated: Predictions with a part of the model taken away, by part (`prime_jax.evaluate.ablation`).

    Raises:
        DataError: If shapes do not fit, or as `search`, `ranking_metrics` and `compare`.
    """
    if predicted.shape != (len(test.query), corpus.embeddings.shape[1]):
        raise DataError(
            f"evaluation: predictions of shape {predicted.shape} for {len(test.query)} queries and passages "
            f"of {corpus.embeddings.shape[1]} dimensions"
        )
    methods: dict[str, Method] = {}
    candidates = baselines(train, dev, corpus)
    with progress("Tuning baselines on dev", len(candidates), "baselines") as advance:
        for baseline in candidates:
            settings, dev_mrr = tune(baseline, dev, corpus)
            vectors = baseline.prepare(test)(settings)
            methods[baseline.name] = _measure(
                vectors, test, corpus, seed, groups, settings, len(baseline.grid), dev_mrr
            )
            advance(1, baseline.name)
    searched = memory or corpus
    methods[PREDICTED] = ours = _measure(predicted, test, searched, seed, groups, {})
    significance = {
        name: {
            metric: compare(ours.metrics[metric], theirs.metrics[metric], seed=seed, groups=groups)
            for metric in COMPARED
        }
        for name, theirs in methods.items()
        if name != PREDICTED
    }
    shown = dict.fromkeys([PREDICTED, "query"])

    def means(vectors: ndarray) -> dict[str, float]:
        found = ranking_metrics(retrieve(vectors, test, searched, 10)[1], test.positives)
        return {name: float(found[name].mean()) for name in COMPARED}

    return Evaluation(
        split=split,
        test=test,
        corpus=len(corpus.embeddings),
        methods=methods,
        significance=significance,
        chance=chance(test, corpus),
        groups=len(test.query) if groups is None else len(np.unique(groups)),
        seed=seed,
        novelty=novelty(
            {name: method.metrics for name, method in methods.items()},
            unseen(test.positives, train.positives),
            PREDICTED,
            seed=seed,
            groups=groups,
        ),
        gauges=gauges(
            {name: methods[name].indices for name in shown},
            predicted,
            test.query,
            searched.embeddings[[int(right[0]) for right in test.positives]],
            len(corpus.embeddings),
        ),
        reliability=None
        if judged is None
        else reliability(judged.confidence, ours.metrics, methods["query"].metrics, COMPARED, seed=seed),
        guard=None
        if judged is None or judged.guarded is None
        else {
            **means(judged.guarded),
            "trust": float(judged.trust.mean()),
            "fallback": judged.fallback,
        },
        ablation={part: means(vectors) for part, vectors in (ablated or {}).items()},
    )


def _measure(
    vectors: ndarray,
    test: Split,
    corpus: Corpus,
    seed: int,
    groups: ndarray | None,
    settings: Settings,
    tried: int = 0,
    dev_mrr: float | None = None,
) -> Method:
    scores, indices = retrieve(vectors, test, corpus, DEPTH)
    metrics = ranking_metrics(indices, test.positives)
    intervals = {name: interval(metrics[name], seed=seed, groups=groups) for name in COMPARED}
    return Method(scores, indices, metrics, intervals, settings, tried, dev_mrr)

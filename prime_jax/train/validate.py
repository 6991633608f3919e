"""Validation during training: search the corpus with the predictions, rank, average, judge."""

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32, Int64

from prime_jax.data.embedded import EmbeddedDataset
from prime_jax.data.steered import ZERO, Steering
from prime_jax.models.confidence import Confidence
from prime_jax.nn.target_head import map_memory
from prime_jax.retrieval.groups import linked
from prime_jax.retrieval.metrics import first_rank, ranking_metrics
from prime_jax.retrieval.mix import MIXES, PLAIN_QUERY, RecencyMix, mixing
from prime_jax.retrieval.novelty import unseen
from prime_jax.retrieval.topk import ExactIndex, Rows
from prime_jax.retrieval.tuning import best_setting
from prime_jax.train import calibration
from prime_jax.train.checkpoints import SELECT_BY
from prime_jax.train.collective import is_main
from prime_jax.train.predicting import SplitPredictor
from prime_jax.train.sharding import everywhere
from prime_jax.train.state import Graph, TrainState
from prime_jax.train.steered_judge import SteeredJudge

DEPTH = 10
UNSEEN = ("P@5", "MRR@10")  # also of the queries whose answers are not in train, where dev has both kinds
TUNED_ON = 512  # queries that a mix is chosen on: each is searched with every mix
SAMPLE = 2048  # vectors that a rank is estimated from
COLLAPSED = 0.25  # of the targets' rank
FAMILIAR = 2048  # training examples that a confidence knows the kind of
FAMILIAR_TEXTS = 512  # the same of a model that reads text: each is a pass of its encoder

Scores = dict[str, float]
Vectors = Float32[np.ndarray, "n E"]


class Validated(NamedTuple):
    """What a validation found; scores and confidence are empty in all processes but the first.

    Attributes:
        scores: Mean ranking metrics of the predictions and their effective `rank`.
        confidence: How far predictions can be trusted, fitted on the split.
        state: What was validated, None where nothing was.
        facts: What else a checkpoint should say of it.
    """

    scores: Scores
    confidence: Confidence | None
    state: TrainState | None = None
    facts: Mapping[str, float] = {}


class Validator:
    """Scores a state on one split.

    Attributes:
        plain_query: The figures of a search with the query itself.
        fallback: The mix of query and turns that searches best, or the query: what a guard goes back to.
        target_rank: Effective rank of the split's targets (see `effective_rank`).
    """

    def __init__(
        self,
        graph: Graph,
        data: EmbeddedDataset,
        split: str,
        mesh: Mesh,
        *,
        steering: Steering | None = None,
        judge_with: str = ZERO,
    ):
        self._predictor = SplitPredictor(graph, data, split, mesh)
        self._data, self._split, self._mesh, self._name = data, data.splits[split], mesh, split
        self._corpus = data.corpus()
        trained = data.splits["train"]
        most = FAMILIAR if trained.sequences is None else FAMILIAR_TEXTS
        few = np.random.default_rng(0).permutation(len(trained))[:most]
        self._few = np.sort(few)
        self._predict_train = SplitPredictor(graph, data, "train", mesh, self._few)
        self._steered = steering and SteeredJudge(self._predictor, data, split, steering, judge_with)
        self._query_centres = calibration.centres_of(data.store[trained.query_rows[self._few]])
        fresh = unseen(self._split.positives, trained.positives)
        self._fresh = fresh if 0 < fresh.sum() < len(fresh) else None
        given = data.context_from == "data" and steering is None
        turns = self._split.context_rows if given else self._split.context_rows[:, :0]
        asked = np.concatenate([turns, self._split.query_rows[:, None]], axis=1)
        self._groups = linked([row[row >= 0].tolist() for row in asked])
        index = self._index(self._corpus)
        self.plain_query = self._means(self._measured(data.store[self._split.query_rows], index))
        self.fallback = PLAIN_QUERY if steering else self._tuned_mix(index)
        self._fallen_back = self._measured(self._mixed(), index)
        self.target_rank = effective_rank(self._corpus[[ids[0] for ids in self._split.positives]])

    def over(self, data: EmbeddedDataset) -> "Validator":
        """The same split of the same data in other embeddings, by the programs that are compiled already.

        `plain_query`, `fallback` and `target_rank` stay those of the first embeddings.
        """
        other = copy.copy(self)
        other._predictor, other._predict_train = self._predictor.over(data), self._predict_train.over(data)
        other._data, other._split, other._corpus = data, data.splits[self._name], data.corpus()
        other._query_centres = calibration.centres_of(data.store[data.splits["train"].query_rows[self._few]])
        other._fallen_back = other._measured(other._mixed(), other._index(other._corpus))
        return other

    def __call__(self, state: TrainState) -> Validated:
        """Score the predictions of a state, and fit how far they can be trusted."""
        predicted, trained = self._predictor(state), self._predict_train(state)
        steered = self._steered.predictions(state) if self._steered else {}
        head = None if state.target_head is None else everywhere(state.target_head, self._mesh)
        if not is_main():
            return Validated({}, None, state)
        encoded, fallback = self._index(self._corpus), self._fallen_back
        index = encoded
        if head is not None:  # what a guard falls back to is mapped as well
            index = self._index(map_memory(head, self._corpus))
            fallback = self._measured(map_memory(head, self._mixed()), index)
        metrics = self._measured(predicted, index)
        judged = self._steered.scores(steered, partial(self._ranks, encoded)) if self._steered else {}
        scores = {**self._means(metrics), **judged, "rank": effective_rank(predicted)}
        return Validated(scores, self._confidence(predicted, trained, metrics, fallback), state)

    def score(self, name: str, state: TrainState) -> float:
        """One of the figures that `__call__` gives, in every process; MRR@10 where dev has no such figure."""
        scores = self._means(self._measured(self._predictor(state), self._index(self._corpus)))
        return scores.get(name, scores[SELECT_BY])

    def collapsing(self, scores: Scores) -> bool:
        """Whether predictions have much fewer directions than the targets."""
        return scores["rank"] < COLLAPSED * self.target_rank

    def warning(self, scores: Scores) -> str:
        """What to say where they are."""
        return (
            f"predictions are collapsing: they spread in {scores['rank']:.0f} directions, the targets in "
            f"{self.target_rank:.0f}; a higher train.temperature or more negatives may help"
        )

    def _confidence(
        self,
        predicted: Vectors,
        trained: Float32[np.ndarray, "m E"],
        metrics: Mapping[str, Any],
        fallback: Mapping[str, Any],
    ) -> Confidence:
        context, mask, query = self._split.arrays(self._data.store)
        return calibration.fit(
            context,
            mask,
            query,
            predicted,
            hit=metrics["P@5"] > 0,
            gain=metrics["MRR@10"] - fallback["MRR@10"],
            groups=self._groups,
            query_centres=self._query_centres,
            answer_centres=calibration.centres_of(trained),
            fallback=self.fallback,
        )

    def _tuned_mix(self, index: ExactIndex) -> RecencyMix:
        """The best mix of query and turns on some of the split's queries."""
        if not np.any(self._split.context_rows >= 0):
            return PLAIN_QUERY
        rows = np.random.default_rng(0).permutation(len(self._split))[:TUNED_ON]
        context, mask, query = (array[rows] for array in self._split.arrays(self._data.store))
        exclude = [self._split.exclude[row] for row in rows]

        def search(vectors: Vectors, copies: int) -> Int64[np.ndarray, "n depth"]:
            scope = np.tile(self._split.scope[rows], copies)
            return index.search(vectors, DEPTH, exclude=exclude * copies, query_scope=scope)[1]

        positives = [self._split.positives[row] for row in rows]
        return best_setting(MIXES, mixing(context, mask, query), search, positives)[0]

    def _mixed(self) -> Vectors:
        """What a guard goes back to for each query."""
        return self.fallback(*self._split.arrays(self._data.store))

    def _index(self, corpus: Rows) -> ExactIndex:
        """The corpus to be searched, on the device for one validation: training needs that memory."""
        return ExactIndex(corpus, self._data.corpus_scope)

    def _ranks(self, index: ExactIndex, vectors: Vectors) -> Int64[np.ndarray, " n"]:
        """Rank of each query's first right passage, 0 beyond `DEPTH`."""
        return first_rank(self._found(vectors, index), self._split.positives)

    def _measured(self, vectors: Vectors, index: ExactIndex) -> dict[str, Any]:
        """Every ranking metric of every query."""
        return ranking_metrics(self._found(vectors, index), self._split.positives)

    def _found(self, vectors: Vectors, index: ExactIndex) -> Int64[np.ndarray, "n depth"]:
        return index.search(vectors, DEPTH, exclude=self._split.exclude, query_scope=self._split.scope)[1]

    def _means(self, metrics: Mapping[str, Any]) -> Scores:
        scores = {name: float(np.mean(values)) for name, values in metrics.items()}
        if self._fresh is not None:
            scores |= {f"unseen {name}": float(np.mean(metrics[name][self._fresh])) for name in UNSEEN}
        return scores


def effective_rank(vectors: Vectors) -> float:
    """In how many directions vectors spread: e to the entropy of their singular values (Roy & Vetterli 2007).

    Of the first 2,048 rows, about their mean; 1 when all lie on a line, at most E.
    """
    sample = vectors[:SAMPLE] - vectors[:SAMPLE].mean(axis=0)
    values = np.linalg.svd(sample, compute_uv=False)
    shares = values[values > 0] / values.sum() if values.sum() > 0 else np.ones(1)
    return float(np.exp(-np.sum(shares * np.log(shares))))

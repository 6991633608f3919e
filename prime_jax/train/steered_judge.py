"""What a steered model does with each kind of steering, and how well its router knows the clusters."""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float32, Int64

from prime_jax.data.embedded import EmbeddedDataset
from prime_jax.data.steered import VARIANTS, ZERO, Steering, steered
from prime_jax.train.predicting import SplitPredictor
from prime_jax.train.state import TrainState
from prime_jax.types import Prediction

Rank = Callable[[Float32[np.ndarray, "n E"]], Int64[np.ndarray, " n"]]


class SteeredJudge:
    """Scores a split under every steering variant.

    Args:
        predictor: Predicts the split; its compiled program is used for every variant.
        data: The dataset.
        split: Name of the split.
        steering: Its steering.
        judge_with: The variant whose clusters and routing are looked at.
    """

    def __init__(
        self,
        predictor: SplitPredictor,
        data: EmbeddedDataset,
        split: str,
        steering: Steering,
        judge_with: str,
    ):
        self._predictors = {
            variant: predictor.over(steered(data, steering, variant)) for variant in (ZERO, *VARIANTS)
        }
        self._judge_with, self._centroids = judge_with, steering.centroids
        counts = np.array([len(ids) for ids in data.splits[split].positives])
        self._cluster = np.asarray(steering.clusters(split)[np.cumsum(counts) - counts])

    def predictions(self, state: TrainState) -> dict[str, Prediction]:
        """Predictions of the split by variant, in every process."""
        return {variant: predict.details(state) for variant, predict in self._predictors.items()}

    def scores(self, predictions: Mapping[str, Prediction], rank: Rank) -> dict[str, float]:
        """`MRR@10` by variant, and accuracy of clusters and routing; `centroid` steering leaks the cluster.

        Args:
            predictions: As `predictions` gave them.
            rank: Gives the rank of the first right passage for predictions of the split, 0 beyond the tenth.
        """
        scores = {}
        for variant, found in predictions.items():
            embedding = np.asarray(found.embedding)
            ranks = rank(embedding)
            scores[f"{variant} MRR@10"] = float(np.mean(np.where(ranks > 0, 1 / np.maximum(ranks, 1), 0.0)))
            if variant != self._judge_with:
                continue
            nearest = np.argmax(embedding @ self._centroids.T, axis=1)
            scores["cluster accuracy"] = float(np.mean(nearest == self._cluster))
            if found.logits is not None:
                chosen = np.argmax(np.asarray(found.logits), axis=1)
                scores["routing accuracy"] = float(np.mean(chosen == self._cluster))
                scores["mean atypicality"] = float(np.mean(np.linalg.norm(np.asarray(found.fine), axis=1)))
        return scores

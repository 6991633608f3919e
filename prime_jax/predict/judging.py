"""What is said of predictions: how likely they find a right passage, and whether a query is too foreign."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from prime_jax.errors import PredictorError
from prime_jax.models import AnyConfig
from prime_jax.models.confidence import Confidence, mix
from prime_jax.predict.inputs import Request, Vectors


class Answer(NamedTuple):
    """Predictions, and how far to trust them; one request has no batch axis.

    Attributes:
        embedding: What to search with, unit norm, `[B, E]`.
        confidence: Probability that a right passage is among the first five that the prediction finds, `[B]`;
            None where the checkpoint carries no calibration.
        trust: How much of the prediction is in `embedding`, from 0 (the query alone, or its mix with turns
            where that was better) to 1, `[B]`; 1 without a guard.
    """

    embedding: np.ndarray
    confidence: np.ndarray | None
    trust: np.ndarray

    def first(self) -> "Answer":
        """The answer to the first request alone, without a batch axis."""
        sure = None if self.confidence is None else self.confidence[0]
        return Answer(self.embedding[0], sure, self.trust[0])


def judge(
    confidence: Confidence | None,
    request: Request,
    predicted: Vectors,
    guard_with: Callable[[Vectors], Vectors] | None,
) -> Answer:
    """Judge predictions that are there already.

    Args:
        confidence: What the checkpoint carries; a guard needs it.
        request: What was asked.
        predicted: The predictions, `[B, E]`.
        guard_with: Maps what the guard goes back to to where the memory lies (`Predictor.map_memory`); None
            for no guard.
    """
    context, query, mask, _ = request
    everything = np.ones(len(query), np.float32)
    if confidence is None:
        return Answer(predicted, None, everything)
    sure = confidence.probability(context, mask, query, predicted)
    if guard_with is None:
        return Answer(predicted, sure, everything)
    trust = confidence.trust(query)
    fallback = confidence.fallback_mix(context, mask, query)
    return Answer(mix(predicted, guard_with(fallback), trust), sure, trust)


def check_guard(config: AnyConfig, confidence: Confidence | None) -> None:
    """Refuse a guard where there can be none.

    Raises:
        PredictorError: If the checkpoint carries no calibration, or answers lie in another space.
    """
    if confidence is None:
        raise PredictorError(
            "this model carries no calibration, so nothing can guard its predictions; one that was validated "
            "while it was trained does. Use guard=False to go without"
        )
    if config.input_dim != config.output_dim:
        raise PredictorError(
            f"queries have {config.input_dim} dimensions and predictions {config.output_dim}, so there is no "
            "query to go back to; use guard=False"
        )

"""What an explanation says, as plain data."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

Vector = Float32[np.ndarray, " E"]


class KnownPair(NamedTuple):
    """A question of the training data that resembles this one, with the source that answered it.

    Attributes:
        question: Its text.
        source: Text of its source.
        source_id: Id of the source.
        similarity: Mean of two cosines: of the questions, and of prediction and source.
    """

    question: str
    source: str
    source_id: str
    similarity: float


class Influence(NamedTuple):
    """What steering changed.

    Attributes:
        kl: KL(routing with steering || routing without), in nats; None without a router.
        l2: Distance of the prediction with steering from the one without.
        subspace_without: Name of the primary subspace without steering.
    """

    kl: float | None
    l2: float
    subspace_without: str


@dataclass(frozen=True, eq=False)
class Explanation:
    """One prediction, explained. The last four vectors are as the model gives them, the rest is for people.

    Attributes:
        question: Text of the question, "" where only its embedding was given.
        primary_subspace: Name of the subspace with the largest weight; without a router, of the centroid
            nearest to the prediction.
        primary_subspace_id: Its number.
        confidence: Weight of that subspace, 0 to 1; None without a router.
        routing_distribution: Weight of every subspace by name, largest first; empty without a router.
        routing_entropy: Of these weights, in nats; None without a router.
        steering_influence: What steering changed.
        atypicality: Norm of the fine part, the distance from what the chosen subspaces stand for; None
            without a router.
        atypicality_rank: Share of known questions with a smaller one, 0 to 1; None without a router.
        similar_known_pairs: Known pairs, the most similar first.
        actionable_signal: What to make of it, in plain words.
        predicted_source_emb: What to search with, `[E]`, unit norm; equals coarse + fine.
        routing: Weight of every subspace in their order, `[K]`, or None.
        coarse_vector: Mix of the centroids, `[E]`, or None.
        fine_vector: What leads from there to the prediction, `[E]`, or None.
    """

    question: str
    primary_subspace: str
    primary_subspace_id: int
    confidence: float | None
    routing_distribution: dict[str, float]
    routing_entropy: float | None
    steering_influence: Influence
    atypicality: float | None
    atypicality_rank: float | None
    similar_known_pairs: tuple[KnownPair, ...]
    actionable_signal: str
    predicted_source_emb: Vector
    routing: Float32[np.ndarray, " K"] | None
    coarse_vector: Vector | None
    fine_vector: Vector | None

    def to_json(self) -> dict[str, Any]:
        """The explanation as JSON values, vectors as lists."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["steering_influence"] = self.steering_influence._asdict()
        values["similar_known_pairs"] = [pair._asdict() for pair in self.similar_known_pairs]
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()
        }

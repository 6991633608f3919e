"""The explanation of predictions: where the router looks, what steering changed, and what is known nearby."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float32
from numpy.typing import ArrayLike

from prime_jax.data.steered import ZERO
from prime_jax.errors import PredictorError
from prime_jax.explain.explanation import Explanation, Influence
from prime_jax.explain.known import KnownPairs, Usual, nearest_centroid, rank_among
from prime_jax.explain.signal import Reading, signal_of
from prime_jax.models import EmbeddingModel
from prime_jax.models.jasper import SteeredConfig
from prime_jax.models.subspace import DecomposedJasperPredictor, SubspaceConfig
from prime_jax.predict.inputs import checked, steered_request
from prime_jax.types import Prediction

ROWS = 256
NEIGHBOURS = 3

Vectors = Float32[np.ndarray, "B D"]
Answers = Callable[[Vectors, Vectors], Prediction]


class Explainer:
    """Explains the predictions of a steered model (JASPER plan, task 12).

    Args:
        model: A `JasperPredictor` or a `DecomposedJasperPredictor`.
        centroids: Unit centroids of the clusters, `[C, E]`.
        names: A name for each.
        known: Pairs to compare with; None leaves `similar_known_pairs` empty.
        usual: What is usual for this model; None leaves ranks at 0.5 and the signal careful.
        answers: Gives predictions `[B]` of questions and steering vectors `[B, D]` in place of the JAX model,
            such as those of an exported bundle.

    Raises:
        PredictorError: If the model takes no steering, or names and centroids differ in number.
    """

    def __init__(
        self,
        model: EmbeddingModel,
        centroids: Float32[np.ndarray, "C E"],
        names: Sequence[str],
        *,
        known: KnownPairs | None = None,
        usual: Usual | None = None,
        answers: Answers | None = None,
    ):
        if not isinstance(model.config, SteeredConfig):
            raise PredictorError(
                f"only steered models are explained; this one is of kind {model.config.kind}"
            )
        if len(centroids) != len(names):
            raise PredictorError(f"{len(centroids)} centroids have {len(names)} names")
        if isinstance(model.config, SubspaceConfig) and model.config.num_subspaces != len(names):
            raise PredictorError(
                f"the model chooses among {model.config.num_subspaces} subspaces, but {len(names)} are named"
            )
        if isinstance(model, DecomposedJasperPredictor) and not np.any(np.asarray(model.centroids[...])):
            raise PredictorError("the model's centroids are all zero: it was never trained on clusters")
        self.config, self.centroids, self.names = model.config, centroids, tuple(names)
        self.known, self.usual = known, usual
        self._answers = answers or partial(_answers, *_compiled(model))

    def explain_prediction(
        self, question: ArrayLike, steering: ArrayLike | None = None, *, text: str = ""
    ) -> Explanation:
        """Explain one prediction.

        Args:
            question: Embedding of the question, `[D]`.
            steering: Steering vector, `[D]`; None steers nowhere.
            text: Text of the question, to be shown.

        Raises:
            PredictorError: For a wrong shape or dtype, NaN or Inf.
        """
        vectors = None if steering is None else np.asarray(steering)[None]
        return self.explain_batch(np.asarray(question)[None], vectors, texts=[text])[0]

    def explain_batch(
        self, questions: ArrayLike, steering: ArrayLike | None = None, *, texts: Sequence[str] = ()
    ) -> list[Explanation]:
        """Explain many predictions; as `explain_prediction`, with `[B, D]` and B texts."""
        request = checked(self.config, *steered_request(self.config, questions, steering))
        asked, context = request.query, request.context
        if request.single:
            raise PredictorError("explain_batch takes [B, D]; for one question call explain_prediction")
        if not len(asked):
            return []
        if texts and len(texts) != len(asked):
            raise PredictorError(f"{len(asked)} questions have {len(texts)} texts")
        steered, plain = self._answers(asked, context[:, 0]), self._answers(asked, np.zeros_like(asked))
        predicted = np.asarray(steered.embedding)
        near = [()] * len(asked) if self.known is None else self.known.nearest(asked, predicted, NEIGHBOURS)
        return [
            self._explain(_row(steered, row), _row(plain, row), near[row], texts[row] if texts else "")
            for row in range(len(asked))
        ]

    def compare_steering_influence(
        self, question: ArrayLike, steerings: Mapping[str, ArrayLike], *, text: str = ""
    ) -> dict[str, Explanation]:
        """Explain one question under several steering vectors `[D]` by name, and under none as `zero`.

        Raises:
            PredictorError: For a vector of another shape, which is named, or one that is called `zero`.
        """
        if ZERO in steerings:
            raise PredictorError(f"no steering vector may be called {ZERO!r}: that stands for none")
        vectors = {ZERO: np.zeros_like(np.asarray(question)), **steerings}
        for name, vector in vectors.items():
            if np.shape(vector) != np.shape(question):
                raise PredictorError(
                    f"steering {name!r} has shape {np.shape(vector)}, the question {np.shape(question)}"
                )
        questions = np.repeat(np.asarray(question)[None], len(vectors), axis=0)
        found = self.explain_batch(
            questions, np.stack([np.asarray(v) for v in vectors.values()]), texts=[text] * len(vectors)
        )
        return dict(zip(vectors, found, strict=True))

    def usual_of(self, questions: Vectors, steering: Vectors) -> Usual:
        """How sure and how far off the model is on known questions, `[n, D]` both; for `usual`."""
        steered, plain = (
            self._answers(questions, steering),
            self._answers(questions, np.zeros_like(questions)),
        )
        moved = np.linalg.norm(np.asarray(steered.embedding) - np.asarray(plain.embedding), axis=1)
        if steered.routing is None:
            return Usual(np.zeros(0, np.float32), np.zeros(0, np.float32), np.sort(moved))
        sure = np.asarray(steered.routing).max(axis=1)
        away = np.linalg.norm(np.asarray(steered.fine), axis=1)
        return Usual(np.sort(sure), np.sort(away), np.sort(moved))

    def _explain(self, found: Prediction, plain: Prediction, near: Any, text: str) -> Explanation:
        embedding = np.asarray(found.embedding)
        primary, without = self._primary(found), self._primary(plain)
        l2 = float(np.linalg.norm(embedding - np.asarray(plain.embedding)))
        routing = None if found.routing is None else np.asarray(found.routing)
        distribution: dict[str, float] = {}
        confidence = entropy = atypicality = rank = kl = None
        if routing is not None:
            order = np.argsort(-routing, kind="stable")
            distribution = {self._label(int(number)): float(routing[number]) for number in order}
            confidence, entropy = float(routing[primary]), _entropy(routing)
            kl = _kl(routing, np.asarray(plain.routing))
            atypicality = float(np.linalg.norm(np.asarray(found.fine)))
            rank = 0.5 if self.usual is None else rank_among(self.usual.atypicality, atypicality)
        influence = Influence(kl, l2, self._label(without))
        read = Reading(list(distribution.items()), self._label(primary), confidence, atypicality, influence)
        return Explanation(
            question=text,
            primary_subspace=self._label(primary),
            primary_subspace_id=primary,
            confidence=confidence,
            routing_distribution=distribution,
            routing_entropy=entropy,
            steering_influence=influence,
            atypicality=atypicality,
            atypicality_rank=rank,
            similar_known_pairs=tuple(near),
            actionable_signal=signal_of(read, self.usual),
            predicted_source_emb=embedding,
            routing=routing,
            coarse_vector=None if found.coarse is None else np.asarray(found.coarse),
            fine_vector=None if found.fine is None else np.asarray(found.fine),
        )

    def _primary(self, found: Prediction) -> int:
        if found.routing is not None:
            return int(np.argmax(np.asarray(found.routing)))
        return int(nearest_centroid(np.asarray(found.embedding)[None], self.centroids)[0])

    def _label(self, number: int) -> str:
        """The name of a subspace, with its number where several have the same one."""
        name = self.names[number]
        return name if self.names.count(name) == 1 else f"{name} ({number})"


def _compiled(model: EmbeddingModel) -> tuple[Any, Any]:
    graph = nnx.split(model)[0]
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def details(params: Any, context: Any, query: Any, mask: Any) -> Prediction:
        prediction: Prediction = nnx.merge(graph, params).details(context, query, mask)
        return prediction

    return jax.jit(details), params


def _answers(details: Any, params: Any, questions: Vectors, steering: Vectors) -> Prediction:
    """Predictions of the JAX model, some rows at a time, padded to one compiled shape."""
    parts = []
    for start in range(0, len(questions), ROWS):
        asked, steered = questions[start : start + ROWS], steering[start : start + ROWS]
        rows = len(asked)
        padding = ((0, ROWS - rows), (0, 0))
        context = np.pad(steered, padding)[:, None]
        found = details(params, context, np.pad(asked, padding), np.any(context != 0, axis=-1))
        parts.append(jax.tree.map(lambda leaf, rows=rows: np.asarray(leaf)[:rows], found))
    whole: Prediction = jax.tree.map(lambda *pieces: np.concatenate(pieces), *parts)
    return whole


def _row(found: Prediction, row: int) -> Prediction:
    one: Prediction = jax.tree.map(lambda leaf: np.asarray(leaf)[row], found)
    return one


def _entropy(weights: np.ndarray) -> float:
    seen = weights[weights > 0]
    return float(-np.sum(seen * np.log(seen)))


def _kl(left: np.ndarray, right: np.ndarray) -> float:
    """KL(left || right) in nats; weights below 1e-12 count as that."""
    seen = left > 0
    return float(np.sum(left[seen] * (np.log(left[seen]) - np.log(np.maximum(right[seen], 1e-12)))))

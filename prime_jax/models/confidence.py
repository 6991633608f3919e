"""How far to trust a prediction, from what is known before anything is searched.

Two questions, answered apart. *Will a right passage be among the first five?* A logistic model of a few
cosines, fitted on the validation split (`prime_jax.train.calibration`), gives the probability. *Is this a
question of the kind that training saw?* A query far from all centres of the training queries is not; there
the guard goes back to what needs no training, because a predictor out of its domain does harm: to the query,
or to a mix of query and turns where that was better on the validation split.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from prime_jax.errors import CheckpointError
from prime_jax.files import write_bytes
from prime_jax.models.bundle import read_tensors
from prime_jax.retrieval.mix import PLAIN_QUERY, RecencyMix
from prime_jax.retrieval.vectors import unit

FILE = "confidence.safetensors"
FEATURES = ("kept", "copied", "followed", "turns", "typical", "familiar")
"""What a probability is computed from; see `features`."""
_ROWS = 4096

Vectors = Float[ndarray, "B D"]


@dataclass(frozen=True)
class Confidence:
    """A fitted judgement of predictions. All arrays float32; F is the number of `FEATURES`.

    Attributes:
        weights: Of the standardised features, `[F]`.
        bias: Their offset, `[1]`.
        mean: Mean of each feature on the validation split, `[F]`.
        scale: Its standard deviation, `[F]`.
        low: Its smallest value there; smaller ones count as this, `[F]`.
        high: Its largest value there, `[F]`.
        query_centres: Unit-norm centres of the training queries, `[K, D]`.
        answer_centres: Unit-norm centres of the predictions for them, `[L, E]`.
        ramp: Cosines with the nearest query centre: nothing is trusted below the first, all above the second.
        strength: 1 where validation shows that predictions beat what the guard goes back to, otherwise 0,
            `[1]`.
        max_turns: N of the model, `[1]`.
        fallback: Weight and decay of the mix that the guard goes back to (`RecencyMix`), `[2]`; weight 0 is
            the query itself.
    """

    weights: Float[ndarray, " F"]
    bias: Float[ndarray, "1"]
    mean: Float[ndarray, " F"]
    scale: Float[ndarray, " F"]
    low: Float[ndarray, " F"]
    high: Float[ndarray, " F"]
    query_centres: Float[ndarray, "K D"]
    answer_centres: Float[ndarray, "L E"]
    ramp: Float[ndarray, "2"]
    strength: Float[ndarray, "1"]
    max_turns: Float[ndarray, "1"]
    fallback: Float[ndarray, "2"] = field(default_factory=lambda: np.asarray(PLAIN_QUERY, np.float32))

    @property
    def fallback_mix(self) -> RecencyMix:
        """What the guard goes back to."""
        return RecencyMix(float(self.fallback[0]), float(self.fallback[1]))

    def probability(
        self,
        context: Float[ndarray, "B N D"],
        mask: Bool[ndarray, "B N"],
        query: Vectors,
        predicted: Float[ndarray, "B E"],
    ) -> Float[ndarray, " B"]:
        """Probability that a right passage is among the first five that `predicted` finds.

        Args:
            context: The turns, oldest first.
            mask: True where a turn is real.
            query: The queries.
            predicted: What the model made of them, unit norm.
        """
        values = features(
            context, mask, query, predicted, self.query_centres, self.answer_centres, int(self.max_turns[0])
        )
        values = (np.clip(values, self.low, self.high) - self.mean) / self.scale
        chance: Float[ndarray, " B"] = 1 / (1 + np.exp(-(values @ self.weights + self.bias)))
        return chance

    def trust(self, query: Vectors) -> Float[ndarray, " B"]:
        """How much of the prediction the guard lets through: 0 for foreign queries, 1 for typical ones."""
        low, high = self.ramp
        share: Float[ndarray, " B"] = np.clip((nearest(query, self.query_centres) - low) / (high - low), 0, 1)
        return np.asarray(self.strength[0] * share, np.float32)

    def tensors(self) -> dict[str, ndarray]:
        """Everything as named arrays, for a file."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


def write_confidence(folder: Path, confidence: Confidence) -> None:
    """Put a judgement into a checkpoint or bundle, before its manifest is written."""
    from safetensors.numpy import save

    write_bytes(folder / FILE, save(confidence.tensors()))


def read_confidence(folder: Path, input_dim: int, output_dim: int) -> Confidence | None:
    """The judgement that a checkpoint or bundle carries, None where it has none.

    Args:
        folder: Its folder, verified.
        input_dim: Dimension D of the model's queries.
        output_dim: Dimension E of its predictions.

    Raises:
        CheckpointError: If the file does not hold one for this model.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    tensors, shapes = read_tensors(path), _shapes(input_dim, output_dim)
    if "fallback" not in tensors:  # of an earlier release: its guard goes back to the query
        del shapes["fallback"]
    if tensors.keys() != shapes.keys():
        raise CheckpointError(f"{path}: holds {sorted(tensors)}, expected {sorted(shapes)}")
    for name, shape in shapes.items():
        given = tensors[name]
        fits = len(given.shape) == len(shape) and all(
            want in (None, size) for size, want in zip(given.shape, shape, strict=True)
        )
        if not fits or given.dtype != np.float32 or given.size == 0 or not np.isfinite(given).all():
            raise CheckpointError(
                f"{path}: {name} must hold finite float32 numbers for this model, found "
                f"{given.dtype} of shape {given.shape}"
            )
    found = Confidence(**tensors)
    if found.fallback_mix.weight < 0 or not 0 <= found.fallback_mix.decay <= 1:
        raise CheckpointError(
            f"{path}: fallback holds {found.fallback.tolist()}, expected a weight of 0 or more and a decay "
            "from 0 to 1"
        )
    return found


def _shapes(input_dim: int, output_dim: int) -> dict[str, tuple[int | None, ...]]:
    """The shape of every array of a file; None is any size."""
    each, one = (len(FEATURES),), (1,)
    return {
        **dict.fromkeys(("weights", "mean", "scale", "low", "high"), each),
        **dict.fromkeys(("bias", "strength", "max_turns"), one),
        "query_centres": (None, input_dim),
        "answer_centres": (None, output_dim),
        "ramp": (2,),
        "fallback": (2,),
    }


def mix(
    predicted: Float[ndarray, "B E"], fallback: Float[ndarray, "B E"], trust: Float[ndarray, " B"]
) -> Float[ndarray, "B E"]:
    """Predictions drawn towards what to fall back to where trust is less than 1; unit norm, float32.

    A trusted prediction is returned unchanged, bit by bit.
    """
    share = trust[:, None]
    drawn = unit(share * predicted + (1 - share) * fallback)
    # A zero query is none to go back to.
    there = (share < 1) & (np.linalg.norm(drawn, axis=1, keepdims=True) > 0)
    return np.where(there, drawn, predicted).astype(np.float32)


def features(
    context: Float[ndarray, "B N D"],
    mask: Bool[ndarray, "B N"],
    query: Vectors,
    predicted: Float[ndarray, "B E"],
    query_centres: Float[ndarray, "K D"],
    answer_centres: Float[ndarray, "L E"],
    max_turns: int,
) -> Float[ndarray, "B F"]:
    """What a probability is computed from, in the order of `FEATURES`.

    `kept`: cosine of prediction and query; `copied`: largest cosine of the prediction and a turn; `followed`:
    cosine of the query and the newest turn; `turns`: number of turns, as a share of N; `typical`: largest
    cosine of the query and a centre of training queries; `familiar`: largest cosine of the prediction and a
    centre of predictions for them. A cosine that does not exist (no turns, or answers in another space than
    queries) is 0.
    """
    if len(query) > _ROWS:  # some rows at a time: unit-norm turns are copies
        parts = [slice(start, start + _ROWS) for start in range(0, len(query), _ROWS)]
        return np.concatenate(
            [
                features(
                    context[part],
                    mask[part],
                    query[part],
                    predicted[part],
                    query_centres,
                    answer_centres,
                    max_turns,
                )
                for part in parts
            ]
        )
    asked = unit(query)
    turns = unit(np.where(mask[..., None], context, 0))
    count = mask.sum(axis=1)
    newest = np.where(mask, np.arange(mask.shape[1]), -1).max(axis=1, initial=-1)
    kept = copied = followed = np.zeros(len(query), np.float32)
    if predicted.shape[1] == query.shape[1]:
        kept = np.sum(predicted * asked, axis=1)
        if mask.shape[1]:
            cosines = np.where(mask, np.einsum("bnd,bd->bn", turns, predicted), -1)
            copied = np.where(count > 0, cosines.max(axis=1), 0)
    if mask.shape[1]:
        last = turns[np.arange(len(query)), np.maximum(newest, 0)]
        followed = np.where(count > 0, np.sum(last * asked, axis=1), 0)
    typical, familiar = nearest(query, query_centres), nearest(predicted, answer_centres)
    columns = [kept, copied, followed, count / max_turns, typical, familiar]
    return np.stack(columns, axis=1).astype(np.float32)


def nearest(vectors: Vectors, centres: Float[ndarray, "K D"]) -> Float[ndarray, " B"]:
    """Largest cosine of each vector and a centre."""
    starts = range(0, len(vectors), _ROWS)
    parts = [(unit(vectors[start : start + _ROWS]) @ centres.T).max(axis=1) for start in starts]
    return np.concatenate([*parts, np.empty(0, np.float32)]).astype(np.float32)

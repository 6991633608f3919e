"""What a prediction looks like on the wire: `PredictorInput` in, `PredictorOutput` out (spec section 4).

An embedding is a list of numbers, or base64 of its little-endian float32 bytes, which is a quarter of the
size and exact. In Python it is a numpy array either way. Which dimension is right is for the predictor to
say, not for the schema: it depends on the model.
"""

import base64
import binascii
from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema

from prime_jax.errors import PredictorError
from prime_jax.frozen import Frozen

Encoding = Literal["list", "base64"]
_ONE = {
    "anyOf": [
        {"type": "array", "items": {"type": "number"}, "minItems": 1},
        {"type": "string", "contentEncoding": "base64", "description": "little-endian float32"},
    ]
}


def to_base64(vector: np.ndarray) -> str:
    """A vector as base64 of its little-endian float32 bytes."""
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()


def _embedding(value: Any) -> np.ndarray:
    """One embedding `[D]`, float32, from any of its forms.

    Raises:
        ValueError: Saying what is wrong, and at which number.
    """
    if isinstance(value, str):
        try:
            raw = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError) as broken:
            raise ValueError(f"is not base64 ({broken})") from None
        if len(raw) % 4:
            raise ValueError(f"holds {len(raw)} bytes, which is no whole number of float32")
        array = np.frombuffer(raw, "<f4").astype(np.float32)
    elif isinstance(value, list | tuple | np.ndarray):
        array = _numbers(value)
    else:
        raise ValueError("must be a list of numbers, or base64 of float32")
    if array.ndim != 1 or array.size == 0:
        raise ValueError("must be a list of numbers, not empty and not nested")
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise ValueError(f"holds NaN, Inf or a number too large for float32 at position {int(bad[0])}")
    return array


def _numbers(value: Any) -> np.ndarray:
    if not isinstance(value, np.ndarray) and not set(map(type, value)) <= {float, int, list, tuple}:
        raise ValueError("must hold numbers only")  # numpy would take True for 1
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError("must be a list of numbers, not nested") from None
    if array.dtype.kind not in "fiu" and array.size:
        raise ValueError("must hold numbers only")
    with np.errstate(over="ignore"):  # what becomes Inf is refused
        return array.astype(np.float32)


def _context(value: Any) -> np.ndarray:
    """Turns `[N, D]`, N at least 1, from a list of embeddings in any of their forms."""
    if not isinstance(value, list | tuple | np.ndarray):
        raise ValueError("must be a list of embeddings")
    if len(value) == 0:
        raise ValueError("cannot be empty")
    turns = []
    for index, turn in enumerate(value):
        try:
            turns.append(_embedding(turn))
        except ValueError as wrong:
            raise ValueError(f"turn {index} {wrong}") from None
        if len(turns[-1]) != len(turns[0]):
            raise ValueError(f"turn {index} has {len(turns[-1])} numbers, turn 0 has {len(turns[0])}")
    return np.stack(turns)


Vector = Annotated[
    Any, BeforeValidator(_embedding), PlainSerializer(lambda array: array.tolist()), WithJsonSchema(_ONE)
]
Vectors = Annotated[
    Any,
    BeforeValidator(_context),
    PlainSerializer(lambda array: array.tolist()),
    WithJsonSchema({"type": "array", "items": _ONE, "minItems": 1}),
]


class PredictorInput(Frozen):
    """One request. In Python the embeddings are float32 arrays, `[N, D]` and `[D]`."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"context_embeddings": [[0.6, 0.8]], "query_embedding": [0.8, 0.6], "encoding": "list"}
        }
    )

    context_embeddings: Vectors = Field(
        description="embeddings of the past turns, oldest first, at least one"
    )
    query_embedding: Vector = Field(description="embedding of the query")
    encoding: Encoding = Field(default="list", description="form of the predicted embedding in the answer")


class PredictorOutput(Frozen):
    """One answer."""

    predicted_embedding: list[float] | str = Field(
        description="unit-norm embedding to search with: numbers, or base64 of little-endian float32"
    )
    confidence: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="calibrated probability that the right passage is among the first five that the "
        "prediction finds; null while the checkpoint carries no calibration",
    )
    trust: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="how much of the prediction is in the embedding: 1 all of it, 0 the query alone; null "
        "where nothing guards",
    )

    @property
    def vector(self) -> np.ndarray:
        """The embedding as an array, `[E]`, float32."""
        return _embedding(self.predicted_embedding)

    @classmethod
    def of(
        cls, vector: np.ndarray, encoding: Encoding, confidence: Any = None, trust: Any = None
    ) -> "PredictorOutput":
        """The answer that carries `vector` `[E]` in the form asked for."""
        return cls(
            predicted_embedding=to_base64(vector) if encoding == "base64" else vector.tolist(),
            confidence=None if confidence is None else float(confidence),
            trust=None if trust is None else float(trust),
        )


def predict_one(answer: Callable[..., Any], request: PredictorInput) -> PredictorOutput:
    """Answer one request with `answer(context [N, D], query [D])`, which gives embedding, confidence, trust.

    Raises:
        PredictorError: If the request does not fit the model.
    """
    if request.context_embeddings.shape[1] != len(request.query_embedding):
        raise PredictorError(
            f"context_embeddings have {request.context_embeddings.shape[1]} dimensions, "
            f"query_embedding has {len(request.query_embedding)}"
        )
    vector, confidence, _ = answer(request.context_embeddings, request.query_embedding)
    return PredictorOutput.of(vector, request.encoding, confidence)

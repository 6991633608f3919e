"""The wire schema: both forms of an embedding mean the same, and what is wrong is named."""

import base64
import json
from typing import Any

import numpy as np
import pytest
from predictors import D, N, make
from pydantic import ValidationError

from prime_jax import PredictorInput, PredictorOutput
from prime_jax.errors import PredictorError
from prime_jax.predict.predictor import Predictor
from prime_jax.predict.schema import to_base64

TURNS = np.array([[1.0, -2.5], [0.1, 3e-20]], np.float32)
QUERY = np.array([0.3, -0.7], np.float32)


def read(**fields: Any) -> PredictorInput:
    """Through JSON, as on the wire."""
    body = {"context_embeddings": TURNS.tolist(), "query_embedding": QUERY.tolist()} | fields
    return PredictorInput.model_validate_json(json.dumps(body))


def test_numbers_base64_and_arrays_mean_the_same() -> None:
    half = [TURNS[0].tolist(), to_base64(TURNS[1])]
    for request in (
        read(),
        read(context_embeddings=[to_base64(turn) for turn in TURNS], query_embedding=to_base64(QUERY)),
        read(context_embeddings=half),
        PredictorInput(context_embeddings=TURNS, query_embedding=QUERY),
        PredictorInput.model_validate_json(read().model_dump_json()),
    ):
        np.testing.assert_array_equal(request.context_embeddings, TURNS)
        np.testing.assert_array_equal(request.query_embedding, QUERY)
        assert request.context_embeddings.dtype == request.query_embedding.dtype == np.float32


def test_base64_is_little_endian_float32() -> None:
    assert to_base64(np.array([1.0, -2.0])) == base64.b64encode(b"\x00\x00\x80\x3f\x00\x00\x00\xc0").decode()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context_embeddings": []}, "cannot be empty"),
        ({"context_embeddings": [[]]}, "turn 0 must be a list of numbers, not empty"),
        ({"context_embeddings": [[1.0, 2.0], [1.0]]}, "turn 1 has 1 numbers, turn 0 has 2"),
        ({"context_embeddings": [[1.0, 2.0], ["1", "2"]]}, "turn 1 must hold numbers only"),
        ({"context_embeddings": [[1.0, 2.0], [1.0, None]]}, "turn 1 must hold numbers only"),
        ({"query_embedding": [True, 0.5]}, "must hold numbers only"),
        ({"context_embeddings": [[[1.0], [2.0, 3.0]]]}, "turn 0 must be a list of numbers, not nested"),
        (
            {"context_embeddings": [[[1.0, 2.0]]]},
            "turn 0 must be a list of numbers, not empty and not nested",
        ),
        ({"context_embeddings": "AAAA"}, "must be a list of embeddings"),
        ({"context_embeddings": 3}, "must be a list of embeddings"),
        ({"query_embedding": 3}, "must be a list of numbers, or base64"),
        ({"query_embedding": None}, "must be a list of numbers, or base64"),
        (
            {"query_embedding": [1.0, float("nan")]},
            "NaN, Inf or a number too large for float32 at position 1",
        ),
        ({"query_embedding": [1e39, 1.0]}, "too large for float32 at position 0"),
        ({"query_embedding": "not base64!"}, "is not base64"),
        ({"query_embedding": base64.b64encode(b"12345").decode()}, "5 bytes, which is no whole number"),
        ({"query_embedding": to_base64(np.array([1, np.inf]))}, "at position 1"),
        ({"query_embedding": ""}, "not empty"),
        ({"encoding": "hex"}, "'list' or 'base64'"),
        ({"extra": 1}, "Extra inputs are not permitted"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        read(**fields)


def test_answers_carry_the_vector_in_the_form_asked_for() -> None:
    vector = np.array([0.6, -0.8], np.float32)
    as_list, as_text = PredictorOutput.of(vector, "list"), PredictorOutput.of(vector, "base64")
    assert json.loads(as_list.model_dump_json())["predicted_embedding"] == vector.tolist()
    assert as_text.predicted_embedding == to_base64(vector)
    for answer in (as_list, as_text):
        assert answer.confidence is None
        np.testing.assert_array_equal(
            PredictorOutput.model_validate_json(answer.model_dump_json()).vector, vector
        )
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        PredictorOutput(predicted_embedding=[1.0], confidence=1.5)


def test_predict_one_gives_what_predict_gives() -> None:
    predictor = Predictor.from_model(make(use_torch_compile=False))
    rng = np.random.default_rng(0)
    turns, query = rng.normal(size=(2, D)).astype(np.float32), rng.normal(size=D).astype(np.float32)
    request = PredictorInput(context_embeddings=turns, query_embedding=query, encoding="base64")
    np.testing.assert_array_equal(predictor.predict_one(request).vector, predictor.predict(turns, query))


@pytest.mark.parametrize(
    ("turns", "query", "message"),
    [
        ((2, D), D - 1, "context_embeddings have 24 dimensions, query_embedding has 23"),
        ((2, D - 1), D - 1, "with D = 24"),
        ((N + 1, D), D, "5 turns, the model takes at most 4"),
    ],
)
def test_a_request_that_does_not_fit_the_model(turns: tuple[int, int], query: int, message: str) -> None:
    predictor = Predictor.from_model(make(use_torch_compile=False))
    request = PredictorInput(context_embeddings=np.ones(turns), query_embedding=np.ones(query))
    with pytest.raises(PredictorError, match=message):
        predictor.predict_one(request)


def test_the_json_schema_describes_the_wire() -> None:
    fields = PredictorInput.model_json_schema()["properties"]
    one = fields["query_embedding"]["anyOf"]
    assert [form["type"] for form in one] == ["array", "string"]
    assert fields["context_embeddings"]["items"]["anyOf"] == one
    assert fields["context_embeddings"]["minItems"] == 1

"""Answers: the prediction, how likely it is right, and the way back to the query."""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from predictors import D, N, calibrated, conversations, make

import prime_jax
from prime_jax.errors import PredictorError
from prime_jax.export.bundle import write_bundle
from prime_jax.predict.predictor import Predictor
from prime_jax.predict.schema import PredictorInput


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    model = make(residual="copy", use_torch_compile=False)
    return Predictor(model, precision="float32", confidence=calibrated(model))


def test_typical_queries_get_the_prediction_and_foreign_ones_themselves(predictor: Predictor) -> None:
    context, query, mask = conversations(20)
    foreign = np.roll(query, D // 2, axis=1)
    answer = predictor.answer(context, query, mask)
    certain = answer.trust == 1
    assert certain.sum() > 10
    predicted = predictor.predict(context, query, mask)
    np.testing.assert_array_equal(answer.embedding[certain], predicted[certain])
    away = predictor.answer(context, foreign, mask)
    assert not away.trust.any()
    np.testing.assert_allclose(
        away.embedding, foreign / np.linalg.norm(foreign, axis=1, keepdims=True), atol=1e-6
    )
    assert answer.confidence is not None
    assert ((answer.confidence > 0) & (answer.confidence < 1)).all()


def test_foreign_queries_get_their_mix_with_the_turns_where_that_was_better_on_dev() -> None:
    model = make(residual="copy", use_torch_compile=False)
    fallback = np.float32([0.5, 0.25])
    confidence = replace(calibrated(model), fallback=fallback)
    predictor = Predictor(model, precision="float32", confidence=confidence)
    context, query, mask = conversations(20)
    foreign = np.roll(query, D // 2, axis=1)
    answer = predictor.answer(context, foreign, mask)
    assert not answer.trust.any()
    for row in range(20):
        expected = foreign[row] / np.linalg.norm(foreign[row])
        for age, turn in enumerate(context[row][mask[row]][::-1]):
            expected = expected + 0.5 * 0.25**age * turn / np.linalg.norm(turn)
        np.testing.assert_allclose(
            answer.embedding[row], expected / np.linalg.norm(expected), rtol=0, atol=1e-6
        )


def test_without_a_guard_it_is_the_prediction(predictor: Predictor) -> None:
    context, query, mask = conversations(5)
    answer = predictor.answer(context, query, mask, guard=False)
    np.testing.assert_array_equal(answer.embedding, predictor.predict(context, query, mask))
    np.testing.assert_array_equal(answer.trust, 1)


def test_one_request_has_no_batch_axis(predictor: Predictor) -> None:
    context, query, mask = conversations(3)
    many = predictor.answer(context, query, mask)
    one = predictor.answer(context[1], query[1], mask[1])
    assert one.embedding.shape == (D,)
    assert one.confidence is not None
    assert many.confidence is not None
    np.testing.assert_allclose(one.confidence, many.confidence[1], rtol=1e-5)
    np.testing.assert_allclose(one.embedding, many.embedding[1], atol=1e-6)


def test_how_turns_are_padded_changes_nothing(predictor: Predictor) -> None:
    """Confidence, too, sees the real turns alone."""
    context, query, mask = conversations(N + 1)
    padded = predictor.answer(np.where(mask[..., None], context, 77), query, mask)
    for row in range(N + 1):
        alone = predictor.answer(context[row][mask[row]], query[row])
        assert alone.confidence is not None
        assert padded.confidence is not None
        np.testing.assert_allclose(alone.confidence, padded.confidence[row], rtol=1e-4)


def test_the_wire_carries_the_confidence(predictor: Predictor) -> None:
    context, query, _ = conversations(1)
    request = PredictorInput(context_embeddings=context[0], query_embedding=query[0])
    expected = predictor.answer(context[0], query[0], guard=False).confidence
    assert predictor.predict_one(request).confidence == pytest.approx(float(expected))


def test_a_guard_needs_a_calibration_and_a_query_in_the_same_space() -> None:
    bare = Predictor.from_model(make(use_torch_compile=False))
    context, query, mask = conversations(2)
    with pytest.raises(PredictorError, match="carries no calibration"):
        bare.answer(context, query, mask)
    assert bare.answer(context, query, mask, guard=False).confidence is None
    model = make(output_dim=8, use_torch_compile=False)
    other = Predictor(model, confidence=calibrated(model))
    with pytest.raises(PredictorError, match="24 dimensions and predictions 8"):
        other.answer(context, query, mask)
    assert other.answer(context, query, mask, guard=False).confidence is not None


def test_a_mapped_memory_gets_a_mapped_query() -> None:
    """Where passages were mapped by a trained head, the query that stands in for a prediction is, too."""
    model = make(residual="query", use_torch_compile=False)
    head = jnp.asarray(0.1 * np.random.default_rng(0).normal(size=(D, D)), jnp.float32)
    predictor = Predictor(model, target_head=head, confidence=calibrated(model, gain=-1))
    context, query, mask = conversations(4)
    asked = query / np.linalg.norm(query, axis=1, keepdims=True)
    served = predictor.answer(context, query, mask).embedding
    np.testing.assert_allclose(served, predictor.map_memory(asked), atol=1e-6)
    assert np.abs(served - asked).max() > 1e-2


def test_a_bundle_carries_it(predictor: Predictor, tmp_path: Path) -> None:
    write_bundle(predictor.model, tmp_path / "bundle", facts={}, confidence=predictor.confidence)
    loaded = prime_jax.load(tmp_path / "bundle", precision="float32")
    assert loaded.info()["calibrated"] is True
    context, query, mask = conversations(8)
    np.testing.assert_allclose(
        loaded.answer(context, query, mask).confidence,
        predictor.answer(context, query, mask).confidence,
        atol=1e-5,
    )

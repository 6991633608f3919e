"""InfoNCE against values worked out by hand and against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from prime_jax.losses.contrastive import info_nce
from prime_jax.losses.objective import Objective
from prime_jax.types import Batch, Prediction

AXES = np.eye(4, dtype=np.float32)


def make_batch(target: np.ndarray, **fields: object) -> Batch:
    rows = len(target)
    ids = fields.pop("target_id", np.arange(rows))
    return Batch(
        context=np.zeros((rows, 1, target.shape[1]), np.float32),
        context_mask=np.zeros((rows, 1), bool),
        query=np.zeros_like(target),
        target=target,
        target_id=ids,
        positive_ids=fields.pop("positive_ids", np.asarray(ids)[:, None]),
        example=np.arange(rows),
        **fields,
    )


def as_jax(batch: Batch) -> Batch:
    return jax.tree.map(jnp.asarray, batch)


def test_hand_computed_value() -> None:
    """Right answer at cosine 1, one negative at cosine 0: -log(e / (e + 1)) at temperature 1."""
    values = info_nce(jnp.asarray(AXES[:2]), as_jax(make_batch(AXES[:2])), temperature=1.0)
    np.testing.assert_allclose(values.loss, np.log1p(np.exp(-1.0)), rtol=1e-6)
    np.testing.assert_array_equal(values.negatives, [1, 1])
    np.testing.assert_allclose(values.chance, np.log(2.0), rtol=1e-6)


def test_default_temperature_is_the_requirement() -> None:
    """BR-PRED-003: at 0.07, cosines of 0.60 and 0.53 lie one nat apart."""
    predicted = np.array([[0.60, 0.53, np.sqrt(1 - 0.60**2 - 0.53**2), 0]], np.float32).repeat(2, axis=0)
    values = info_nce(jnp.asarray(predicted), as_jax(make_batch(AXES[:2])))
    np.testing.assert_allclose(values.loss, [np.log1p(np.exp(-1.0)), np.log1p(np.exp(1.0))], rtol=1e-5)


def test_random_predictions_stand_at_chance() -> None:
    """In many dimensions random vectors are nearly orthogonal, so the loss is nearly log(rows)."""
    rng = np.random.default_rng(0)
    predicted, target = rng.normal(size=(2, 64, 4096)).astype(np.float32)
    loss, figures = Objective(1.0)(Prediction(jnp.asarray(predicted)), as_jax(make_batch(target)), {})
    np.testing.assert_allclose(loss, np.log(64), atol=0.01)
    np.testing.assert_allclose(figures["chance"], np.log(64), rtol=1e-6)
    assert figures["negatives"] == 63


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_in_batch_equals_torch_cross_entropy(temperature: float) -> None:
    rng = np.random.default_rng(1)
    predicted, target = rng.normal(size=(2, 8, 16)).astype(np.float32)
    ours = info_nce(jnp.asarray(predicted), as_jax(make_batch(target)), temperature=temperature).loss
    left, right = (torch.nn.functional.normalize(torch.tensor(x), dim=-1) for x in (predicted, target))
    theirs = torch.nn.functional.cross_entropy(
        left @ right.T / temperature, torch.arange(8), reduction="none"
    )
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-5, atol=1e-5)


def test_explicit_negatives_join_the_batch() -> None:
    """Row 0 has one more orthogonal negative, row 1 an empty slot: log(1 + 2/e) and log(1 + 1/e)."""
    negatives = np.stack([AXES[3:4], np.zeros((1, 4), np.float32)])
    batch = make_batch(AXES[:2], negatives=negatives, negative_ids=np.array([[7], [-1]]))
    values = info_nce(jnp.asarray(AXES[:2]), as_jax(batch), temperature=1.0)
    np.testing.assert_allclose(values.loss, np.log1p([2 * np.exp(-1.0), np.exp(-1.0)]), rtol=1e-6)
    np.testing.assert_array_equal(values.negatives, [2, 1])


def test_same_passage_in_another_row_is_no_negative() -> None:
    """Rows 0 and 1 want the same passage; only row 2's is a negative for them."""
    target = AXES[[0, 0, 1]]
    values = info_nce(
        jnp.asarray(target), as_jax(make_batch(target, target_id=np.array([5, 5, 9]))), temperature=1.0
    )
    np.testing.assert_array_equal(values.negatives, [1, 1, 2])
    np.testing.assert_allclose(values.loss[0], np.log1p(np.exp(-1.0)), rtol=1e-6)


def test_another_right_answer_of_the_example_is_no_negative() -> None:
    """Row 0 has two right answers; the second happens to be row 1's target and an explicit negative."""
    batch = make_batch(
        AXES[:2],
        positive_ids=np.array([[0, 1], [1, -1]]),
        negatives=np.stack([AXES[1:2], AXES[2:3]]),
        negative_ids=np.array([[1], [2]]),
    )
    values = info_nce(jnp.asarray(AXES[:2]), as_jax(batch), temperature=1.0)
    np.testing.assert_array_equal(values.negatives, [0, 2])
    assert values.loss[0] == 0.0


def test_a_masked_row_gives_no_gradient_and_no_nan() -> None:
    """A batch of one has nothing to tell apart: loss 0, gradient 0, even at a tiny temperature."""

    def loss(predicted: jax.Array) -> jax.Array:
        return Objective(1e-3)(Prediction(predicted), as_jax(make_batch(AXES[:1])), {})[0]

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(AXES[:1]))
    assert value == 0.0
    np.testing.assert_array_equal(gradient, 0.0)


def test_order_of_rows_does_not_matter() -> None:
    rng = np.random.default_rng(2)
    predicted, target = rng.normal(size=(2, 6, 8)).astype(np.float32)
    order = rng.permutation(6)
    plain = info_nce(jnp.asarray(predicted), as_jax(make_batch(target))).loss
    moved = info_nce(jnp.asarray(predicted[order]), as_jax(make_batch(target[order]))).loss
    np.testing.assert_allclose(moved, plain[order], rtol=1e-5, atol=1e-6)


def test_negatives_without_ids_are_refused() -> None:
    batch = make_batch(AXES[:2], negatives=np.zeros((2, 1, 4), np.float32))
    with pytest.raises(ValueError, match="negative_ids"):
        info_nce(jnp.asarray(AXES[:2]), as_jax(batch))


def test_all_right_answers_of_a_row_by_hand() -> None:
    """Query on axis 0; right answers on axes 0 and 1, a negative on axis 2: losses log(1 + 1/e) and log 2."""
    batch = as_jax(make_batch(AXES[[0, 2]]))._replace(
        positives=jnp.asarray(np.stack([AXES[[0, 1]], AXES[[2, 2]]])),
        positive_ids=jnp.array([[0, 7], [1, -1]]),
    )
    values = info_nce(jnp.asarray(AXES[[0, 2]]), batch, temperature=1.0)
    both = (np.log(1 + np.exp(-1)) + np.log(2)) / 2
    np.testing.assert_allclose(values.loss, [both, np.log(1 + np.exp(-1))], rtol=1e-5)
    assert values.negatives.tolist() == [1, 1]

"""Routing: a random choice with a gradient in training, a plain one when predicting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prime_jax.nn.router import gumbel_softmax, gumbel_temperature, one_hot_forward, routing_weights

LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32))
KEY = jax.random.key(0)


def test_temperature_falls_on_half_a_cosine() -> None:
    """1.0 to 0.1: quarters of the run at 0.1 + 0.45 (1 + cos), and nothing beyond the ends."""
    expected = {-0.5: 1.0, 0.0: 1.0, 0.25: 0.868198, 0.5: 0.55, 0.75: 0.231802, 1.0: 0.1, 1.5: 0.1}
    for progress, value in expected.items():
        np.testing.assert_allclose(gumbel_temperature(progress), value, rtol=1e-5)
    np.testing.assert_allclose(gumbel_temperature(0.5, start=2.0, end=1.0), 1.5, rtol=1e-6)


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.1, 1e-3])
def test_rows_sum_to_1(temperature: float, straight_through: bool) -> None:
    weights = gumbel_softmax(LOGITS, temperature, KEY, straight_through=straight_through)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-6)
    assert float(weights.min()) >= 0


def test_choices_come_as_often_as_the_softmax_says() -> None:
    """The Gumbel-max trick: the largest weight is a draw from the categorical distribution."""
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05])) + 3.0
    weights = gumbel_softmax(jnp.tile(logits, (20000, 1)), 0.7, KEY)
    often = np.bincount(np.argmax(weights, axis=1), minlength=4) / 20000
    np.testing.assert_allclose(often, [0.5, 0.3, 0.15, 0.05], atol=0.012)


def test_a_low_temperature_is_nearer_to_a_single_choice() -> None:
    largest = [float(gumbel_softmax(LOGITS, t, KEY).max(axis=1).mean()) for t in (1.0, 0.3, 0.1)]
    assert largest[0] < largest[1] < largest[2]
    assert largest[2] > 0.95


def test_straight_through_is_one_hot_forward_and_soft_backward() -> None:
    """The chosen is exactly 1 and the rest exactly 0; the slope is that of the soft choice."""
    pull = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32))

    def pulled(logits: jax.Array, hard: bool) -> jax.Array:
        return jnp.sum(pull * gumbel_softmax(logits, 0.8, KEY, straight_through=hard))

    soft, hard = (gumbel_softmax(LOGITS, 0.8, KEY, straight_through=hard) for hard in (False, True))
    np.testing.assert_array_equal(hard, np.eye(4)[np.argmax(soft, axis=1)])
    slopes = [jax.grad(pulled)(LOGITS, hard) for hard in (False, True)]
    assert float(jnp.abs(slopes[1]).min()) > 1e-4
    np.testing.assert_allclose(slopes[0], slopes[1], atol=1e-6)


def test_one_hot_is_exact_for_every_weight() -> None:
    """Not a rounding away from it, compiled or not."""
    largest = jnp.linspace(0.26, 0.99, 5000)
    weights = jnp.stack([largest, *[(1 - largest) / 3] * 3], axis=1)
    for forward in (one_hot_forward, jax.jit(one_hot_forward)):
        np.testing.assert_array_equal(forward(weights), np.tile([1.0, 0, 0, 0], (5000, 1)))


def test_noise_follows_its_key_and_its_row() -> None:
    same = jnp.zeros((2, 4))
    one, again, other = (gumbel_softmax(same, 1.0, jax.random.key(n)) for n in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert float(jnp.abs(one - other).max()) > 0.01
    assert float(jnp.abs(one[0] - one[1]).max()) > 0.01


def test_predicting_weighs_by_softmax_or_takes_the_largest() -> None:
    logits = jnp.log(jnp.array([[1.0, 2.0, 5.0], [6.0, 1.0, 1.0]]))
    np.testing.assert_allclose(
        routing_weights(logits, "softmax"), [[0.125, 0.25, 0.625], [0.75, 0.125, 0.125]], rtol=1e-6
    )
    np.testing.assert_array_equal(routing_weights(logits, "argmax"), [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])


def test_the_first_of_equals_is_taken() -> None:
    """One subspace, never two, in training too."""
    tied = jnp.array([[0.0, 1.0, 1.0], [2.0, 2.0, 2.0]])
    np.testing.assert_array_equal(routing_weights(tied, "argmax"), [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    np.testing.assert_array_equal(
        one_hot_forward(tied / tied.sum(axis=1, keepdims=True)), [[0, 1, 0], [1, 0, 0]]
    )


@pytest.mark.parametrize("how", ["softmax", "argmax"])
def test_huge_logits_stay_finite(how: str) -> None:
    weights = routing_weights(jnp.array([[1e30, -1e30, 0.0]]), how)
    np.testing.assert_array_equal(weights, [[1.0, 0.0, 0.0]])

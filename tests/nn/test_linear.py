"""Dropout leaves the right share, scaled so that the mean stays, independently in every element."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prime_jax.nn.linear import dropout


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("width", [64, 63])
def test_dropout_keeps_its_share_and_the_mean(rate: float, width: int) -> None:
    ones = jnp.ones((2000, width))
    left = np.asarray(dropout(ones, rate, jax.random.key(0)))
    kept = left != 0
    assert kept.mean() == pytest.approx(1 - rate, abs=0.005)
    np.testing.assert_allclose(left[kept], 1 / (1 - rate), rtol=1e-4)
    assert left.mean() == pytest.approx(1, abs=0.01)
    # Neighbours share a random word, but nothing else: no two columns agree more than by chance.
    agreement = np.mean(kept[:, :-1] == kept[:, 1:], axis=0)
    np.testing.assert_allclose(agreement, rate**2 + (1 - rate) ** 2, atol=0.06)


def test_no_key_or_no_rate_changes_nothing() -> None:
    x = jnp.arange(6.0).reshape(2, 3)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x

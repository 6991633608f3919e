"""The target encoder: where it starts, what it computes, what it can learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prime_jax.nn.online_encoder import encode, initial_encoder

torch = pytest.importorskip("torch")

VECTORS = np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32)


def learned(seed: int = 1) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    start = initial_encoder(jax.random.key(0), 9)
    return {
        name: leaf + jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32)
        for name, leaf in start.items()
    }


def test_it_starts_as_the_identity_at_a_norm_of_root_e() -> None:
    """Root of 9 is 3."""
    unit = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    start = initial_encoder(jax.random.key(0), 9)
    np.testing.assert_allclose(encode(start, jnp.asarray(VECTORS)), 3 * unit, rtol=1e-5)


def test_equals_torch() -> None:
    params = {name: torch.tensor(np.asarray(leaf)) for name, leaf in learned().items()}
    there = torch.tensor(VECTORS)
    hidden = torch.nn.functional.gelu(there @ params["inner"] + params["bias"])
    theirs = 3 * torch.nn.functional.normalize(there + hidden @ params["outer"])
    ours = encode(learned(), jnp.asarray(VECTORS))
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(ours, axis=1), 3.0, rtol=1e-6)


def test_it_can_learn_from_its_first_step_on() -> None:
    """At the start only the second matrix has a gradient; once that is not zero, all have."""

    def slopes(params: dict[str, jax.Array]) -> dict[str, float]:
        gradient = jax.grad(lambda p: jnp.sum(encode(p, jnp.asarray(VECTORS))[:, 0]))(params)
        return {name: float(jnp.abs(leaf).max()) for name, leaf in gradient.items()}

    start = slopes(initial_encoder(jax.random.key(0), 9))
    assert start["outer"] > 1e-2
    assert start["inner"] == start["bias"] == 0
    assert min(slopes(learned()).values()) > 1e-2


def test_a_zero_vector_is_no_nan() -> None:
    start = initial_encoder(jax.random.key(0), 9)
    value, slope = jax.value_and_grad(lambda x: encode(start, x).sum())(jnp.zeros((1, 9)))
    assert value == 0
    assert np.isfinite(slope).all()

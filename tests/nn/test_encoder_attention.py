"""Attention with a gradient of its own against what JAX derives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prime_jax.nn.encoder_attention import join_heads, masked_attention, split_qkv

B, S, HEADS, DIM = 3, 7, 2, 4


def derived(qkv: jax.Array, mask: jax.Array) -> jax.Array:
    """The same attention in plain operations."""
    parts = qkv.reshape(B, S, 3, HEADS, DIM)
    logits = jnp.einsum("bqhd,bkhd->bhqk", parts[:, :, 0], parts[:, :, 1]) / jnp.sqrt(DIM)
    weights = jax.nn.softmax(jnp.where(mask[:, None], logits, -1e30), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, parts[:, :, 2]).reshape(B, S, -1)


def ours(qkv: jax.Array, mask: jax.Array, dtype: str = "float32") -> jax.Array:
    parts = split_qkv(qkv, HEADS)
    return join_heads(masked_attention(*parts, mask[:, None], jnp.dtype(dtype), False))


@pytest.mark.parametrize("packed", [False, True])
def test_answer_and_gradient_are_those_that_jax_derives(packed: bool) -> None:
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.normal(size=(B, S, 3 * HEADS * DIM)), jnp.float32)
    slope = jnp.asarray(rng.normal(size=(B, S, HEADS * DIM)), jnp.float32)
    if packed:
        segment = jnp.asarray([[1, 1, 1, 2, 2, 0, 0], [1] * 7, [1, 2, 3, 3, 3, 3, 0]])
        mask = (segment[:, :, None] == segment[:, None, :]) & (segment > 0)[:, None, :]
    else:
        mask = jnp.arange(S)[None, None, :] < jnp.asarray([3, 7, 1])[:, None, None]
    expected, pull = jax.vjp(lambda x: derived(x, mask), qkv)
    found, pulled = jax.vjp(lambda x: ours(x, mask), qkv)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(pulled(slope)[0], pull(slope)[0], atol=2e-6)


def test_bfloat16_rounds_factors_only() -> None:
    rng = np.random.default_rng(1)
    qkv = jnp.asarray(rng.normal(size=(B, S, 3 * HEADS * DIM)), jnp.float32)
    mask = jnp.ones((B, 1, S), bool)
    expected, pull = jax.vjp(lambda x: derived(x, mask), qkv)
    found, pulled = jax.vjp(lambda x: ours(x, mask, "bfloat16"), qkv)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=0.05)
    slope = jnp.ones_like(expected)
    cosine = jnp.vdot(pulled(slope)[0], pull(slope)[0]) / (
        jnp.linalg.norm(pulled(slope)[0]) * jnp.linalg.norm(pull(slope)[0])
    )
    assert cosine > 0.9999

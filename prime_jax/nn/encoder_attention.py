"""Attention of text encoders with a backward pass of its own.

What JAX derives moves every array of heads through padded copies and takes twice as long on CPUs; the
gradient written here is the same to rounding.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from prime_jax.nn.attention import MASKED
from prime_jax.nn.encoder_products import encoder_product


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def split_qkv(
    qkv: Float[Array, "B S three_H"], num_heads: int
) -> tuple[Float[Array, "B heads S head_dim"], ...]:
    """Queries, keys and values of every head from one fused projection."""
    batch, tokens, width = qkv.shape
    parts = qkv.reshape(batch, tokens, 3, num_heads, width // (3 * num_heads))
    return tuple(jnp.swapaxes(parts[:, :, part], 1, 2) for part in range(3))


def _split_forward(qkv: Array, num_heads: int) -> tuple[tuple[Array, ...], None]:
    return split_qkv(qkv, num_heads), None


def _split_backward(num_heads: int, _: None, slopes: tuple[Array, ...]) -> tuple[Array]:
    return (jnp.concatenate([join_heads(slope) for slope in slopes], axis=-1),)


split_qkv.defvjp(_split_forward, _split_backward)


def join_heads(x: Float[Array, "B heads S head_dim"]) -> Float[Array, "B S H"]:
    """The heads of every token side by side."""
    return jnp.swapaxes(x, 1, 2).reshape(x.shape[0], x.shape[2], -1)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def masked_attention(
    queries: Float[Array, "B heads S head_dim"],
    keys: Float[Array, "B heads S head_dim"],
    values: Float[Array, "B heads S head_dim"],
    mask: Bool[Array, "B 1 Q S"],
    dtype: DTypeLike,
    tf32: bool,
) -> Float[Array, "B heads S head_dim"]:
    """Scaled dot-product attention, heads in front of tokens, softmax in float32.

    On CPUs this layout is up to 2.5 times faster than contracting `[B, S, heads, head_dim]` in place.

    Args:
        queries: `[B, heads, S, head_dim]`.
        keys: `[B, heads, S, head_dim]`.
        values: `[B, heads, S, head_dim]`.
        mask: True where a query may look at a key; `[B, 1, 1, S]` for the same keys for all.
        dtype: Of the factors of products.
        tf32: Whether factors may be rounded to TF32.
    """
    return _attend(queries, keys, values, mask, dtype, tf32)[0]


def _attend(
    queries: Array, keys: Array, values: Array, mask: Array, dtype: DTypeLike, tf32: bool
) -> tuple[Array, Array]:
    """What attention answers, and its weights."""
    scaled = queries * queries.shape[-1] ** -0.5
    logits = encoder_product("bhqd,bhkd->bhqk", scaled, keys, dtype, tf32)
    logits = jnp.where(mask, logits, MASKED)
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    mixed = encoder_product("bhqk,bhkd->bhqd", weights, values, dtype, tf32)
    return mixed / total, weights / total


def _forward(
    queries: Array, keys: Array, values: Array, mask: Array, dtype: DTypeLike, tf32: bool
) -> tuple[Array, tuple[Any, ...]]:
    mixed, weights = _attend(queries, keys, values, mask, dtype, tf32)
    return mixed, (queries, keys, values, mask, weights.astype(dtype))


def _backward(
    dtype: DTypeLike, tf32: bool, kept: tuple[Any, ...], slope: Array
) -> tuple[Array, Array, Array, None]:
    """Both products' gradients; that of the softmax is `weights * (slope - sum(weights * slope))`."""
    queries, keys, values, mask, weights = kept

    def product(equation: str, left: Array, right: Array) -> Array:
        return encoder_product(equation, left, right, dtype, tf32)

    scale = queries.shape[-1] ** -0.5
    of_values = product("bhqk,bhqd->bhkd", weights, slope)
    of_weights = product("bhqd,bhkd->bhqk", slope, values)
    common = jnp.sum(weights * of_weights, axis=-1, keepdims=True)
    of_logits = jnp.where(mask, weights * (of_weights - common), 0.0)
    of_queries = scale * product("bhqk,bhkd->bhqd", of_logits, keys)
    of_keys = scale * product("bhqk,bhqd->bhkd", of_logits, queries)
    return of_queries, of_keys, of_values, None


masked_attention.defvjp(_forward, _backward)

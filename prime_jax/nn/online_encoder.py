"""JASPER's target encoder: a small trained map of source embeddings, and its slow average (plan, task 2).

It gives an auxiliary space in which predictions and sources are compared; nothing is ever searched there.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from prime_jax.nn.linear import einsum_accumulate_f32, unit

Encoder = dict[str, Any]


def initial_encoder(key: Key[Array, ""], dim: int) -> Encoder:
    """An encoder that starts as the identity: its second matrix is zero."""
    spread = jax.nn.initializers.xavier_uniform()(key, (dim, dim), jnp.float32)
    return {"inner": spread, "bias": jnp.zeros(dim), "outer": jnp.zeros((dim, dim))}


@jax.named_scope("online_encoder")
def encode(encoder: Encoder, vectors: Float[Array, "B E"]) -> Float[Array, "B E"]:
    """`vectors + outer(gelu(inner(vectors)))`, scaled to a norm of sqrt(E).

    At that norm, vectors spread evenly over the sphere have variance 1 in every coordinate, so losses made
    for standardised features (SmoothL1 with beta 1, VICReg with gamma 1) mean here what they mean there.
    """
    inner = einsum_accumulate_f32("be,eh->bh", vectors, encoder["inner"], jnp.float32) + encoder["bias"]
    hidden = jax.nn.gelu(inner, approximate=False)
    moved = vectors + einsum_accumulate_f32("bh,he->be", hidden, encoder["outer"], jnp.float32)
    return unit(moved) * jnp.sqrt(jnp.float32(vectors.shape[-1]))

"""ProjNCE: InfoNCE in a learned projection of the embedding space (enhancement of FR-PRED-008)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from prime_jax.nn.linear import einsum_accumulate_f32
from prime_jax.types import Batch


def initial_projection(key: Key[Array, ""], dim: int, projected: int) -> Float[Array, "E P"]:
    """A random projection that keeps lengths on average."""
    return jax.random.normal(key, (dim, projected)) / jnp.sqrt(jnp.float32(projected))


def project(
    projection: Float[Array, "E P"], predicted: Float[Array, "B E"], batch: Batch
) -> tuple[Float[Array, "B P"], Batch]:
    """Predictions, targets and negatives in the projection, for `info_nce` to compare there.

    The one projection serves both sides, so what it learns is a metric between embeddings.
    """

    def through(vectors: Float[Array, "*a E"]) -> Float[Array, "*a P"]:
        with jax.named_scope("projection"):
            return einsum_accumulate_f32("...e,ep->...p", vectors, projection, jnp.float32)

    return through(predicted), batch.map_targets(through)

"""Turning a batch: the same random rotation for everything that goes in, undone in what comes out.

A model that only learned which directions of the embedding space belong together fails on a turned batch; one
that relates turns, query and answer to each other does not. Turning some batches makes training prefer the
second, which is what carries over to conversations about things it never saw.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def random_rotation(key: Key[Array, ""], dim: int, share: float) -> Float[Array, "D D"]:
    """A random orthogonal matrix (uniform, Mezzadri 2007) in `share` of the draws, the identity otherwise.

    Args:
        key: Decides both.
        dim: D.
        share: From 0 to 1.
    """
    choose, draw = jax.random.split(key)

    def drawn() -> Array:
        q, r = jnp.linalg.qr(jax.random.normal(draw, (dim, dim)))
        return q * jnp.sign(jnp.diagonal(r))

    turned: Array = jax.lax.cond(jax.random.uniform(choose) < share, drawn, lambda: jnp.eye(dim))
    return turned

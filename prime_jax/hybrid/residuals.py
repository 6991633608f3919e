"""A store of past jumps: what was seen, what correction helped, how far the loss was from its prediction."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from prime_jax.hybrid.features import FEATURES

NEAREST = 8


class Residuals(NamedTuple):
    """A ring of fixed capacity C, the oldest overwritten first.

    Attributes:
        features: At each jump, `[C, 64]`.
        coefficients: That were kept, in units of `corrector`, zero where the jump was refused, `[C, G, P]`.
        loss: Loss after the jump less the predicted loss, `[C]`.
        filled: Jumps stored ever.
    """

    features: Float[Array, "C F"]
    coefficients: Float[Array, "C G P"]
    loss: Float[Array, " C"]
    filled: Int32[Array, ""]


class Correction(NamedTuple):
    """What similar jumps needed, and how much they agree (0 to 1)."""

    coefficients: Float[Array, "G P"]
    loss: Float[Array, ""]
    agreement: Float[Array, ""]


def init_residuals(capacity: int, groups: int, basis: int) -> Residuals:
    """An empty store."""
    return Residuals(
        jnp.zeros((capacity, FEATURES)),
        jnp.zeros((capacity, groups, basis)),
        jnp.zeros(capacity),
        jnp.zeros((), jnp.int32),
    )


def add(store: Residuals, features: Array, coefficients: Array, loss: Array | float) -> Residuals:
    """The store with one jump more."""
    at = store.filled % len(store.loss)
    return Residuals(
        store.features.at[at].set(features),
        store.coefficients.at[at].set(coefficients),
        store.loss.at[at].set(loss),
        store.filled + 1,
    )


def look_up(store: Residuals, features: Float[Array, " F"]) -> Correction:
    """Mean of the most similar jumps, weighted by cosine; an empty store corrects nothing.

    Being weighted means, corrections never exceed what was stored.
    """
    lengths = jnp.linalg.norm(store.features, axis=1) * jnp.linalg.norm(features)
    similar = store.features @ features / jnp.maximum(lengths, 1e-12)
    there = jnp.arange(len(store.loss)) < store.filled
    similar = jnp.where(there, jnp.maximum(similar, 0.0), 0.0)
    few = min(NEAREST, len(store.loss))
    least = jnp.sort(similar)[-few]
    weight = jnp.where(similar >= least, similar, 0.0)
    total = jnp.sum(weight)
    weight = weight / jnp.maximum(total, 1e-12)
    mean = jnp.sum(weight * store.loss)
    spread = jnp.sqrt(jnp.sum(weight * (store.loss - mean) ** 2))
    agreement = jnp.where(total > 0, jnp.exp(-spread / (jnp.abs(mean) + spread + 1e-12)), 0.0)
    return Correction(jnp.einsum("c,cgp->gp", weight, store.coefficients), mean, agreement)

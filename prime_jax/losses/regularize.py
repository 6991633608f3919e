"""VICReg: keep vectors from collapsing to few directions (arXiv 2105.04906).

Gamma is 1 as published, so features must be standardised; unit vectors are scaled by sqrt(E) first.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

EPSILON = 1e-4


class VICReg(NamedTuple):
    """The three parts of VICReg, each a scalar; variance and covariance need two rows and are 0 for one."""

    variance: Float[Array, ""]
    invariance: Float[Array, ""]
    covariance: Float[Array, ""]


def vicreg(left: Float[Array, "B E"], right: Float[Array, "B E"], gamma: float = 1.0) -> VICReg:
    """Variance, invariance and covariance of two views of the same examples.

    Args:
        left: One view, `[B, E]`.
        right: The other.
        gamma: Standard deviation below which a coordinate is pushed apart.
    """
    return VICReg(
        variance_hinge(left, gamma) + variance_hinge(right, gamma),
        jnp.mean((left - right) ** 2),
        off_diagonal_covariance(left) + off_diagonal_covariance(right),
    )


def variance_hinge(x: Float[Array, "B F"], gamma: float = 1.0) -> Float[Array, ""]:
    """Mean over the coordinates of `max(0, gamma - sqrt(variance + 1e-4))`; 0 for a single row."""
    if x.shape[0] < 2:
        return jnp.zeros(())
    deviation = jnp.sqrt(jnp.var(x, axis=0, ddof=1) + EPSILON)
    return jnp.mean(jnp.maximum(0.0, gamma - deviation))


@jax.named_scope("covariance")
def off_diagonal_covariance(x: Float[Array, "B F"]) -> Float[Array, ""]:
    """Sum of the squared covariances of different coordinates over their number F; 0 for a single row."""
    if x.shape[0] < 2:
        return jnp.zeros(())
    centred = x - jnp.mean(x, axis=0)
    covariance = centred.T @ centred / (x.shape[0] - 1)
    squared = covariance**2
    return (jnp.sum(squared) - jnp.sum(jnp.diagonal(squared))) / x.shape[1]

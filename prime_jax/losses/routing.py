"""What a subspace router learns from (JASPER plan, task 11). Values are per example where they can be.

Cross-entropy (`alignment.cross_entropy` on the router's logits) says where an example belongs, the entropy
schedule how sure the router should be by now, the hinge keeps the residual small so that the routing matters,
and `regularize.off_diagonal_covariance` of the weights keeps subspaces from doing the same job.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def entropy(weights: Float[Array, "*a K"]) -> Float[Array, "*a"]:
    """Entropy of weights that sum to 1, in nats; 0 for a single choice, log K for none."""
    safe = jnp.maximum(weights, 1e-12)
    return -jnp.sum(weights * jnp.log(safe), axis=-1)


def entropy_target(
    epoch: Float[Array, ""] | float, subspaces: int, epochs: float = 20.0, end: float = 0.1
) -> Float[Array, ""]:
    """Entropy that routing should have by now: from log K down to `end` on a line over `epochs` epochs."""
    start = jnp.log(jnp.float32(subspaces))
    return start + (end - start) * jnp.clip(jnp.asarray(epoch, jnp.float32) / epochs, 0.0, 1.0)


def entropy_loss(weights: Float[Array, "B K"], target: Float[Array, ""] | float) -> Float[Array, " B"]:
    """Squared distance of each row's entropy from the target, `[B]`."""
    return (entropy(weights) - target) ** 2


def residual_hinge(fine: Float[Array, "B E"], margin: float) -> Float[Array, " B"]:
    """`max(0, |fine| - margin)`: residuals up to the margin are free, `[B]`."""
    norm = jnp.sqrt(jnp.sum(fine * fine, axis=-1) + 1e-12)
    return jnp.maximum(0.0, norm - margin)

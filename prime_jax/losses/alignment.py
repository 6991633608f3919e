"""How far predictions are from what they should be, without negatives. Values are per example."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from prime_jax.nn.linear import unit


def smooth_l1(
    predicted: Float[Array, "B E"], target: Float[Array, "B E"], beta: float = 1.0
) -> Float[Array, " B"]:
    """Mean over the coordinates of `d^2 / (2 beta)` below beta and `|d| - beta / 2` above, `[B]`."""
    apart = jnp.abs(predicted - target)
    return jnp.mean(jnp.where(apart < beta, 0.5 * apart**2 / beta, apart - 0.5 * beta), axis=-1)


@jax.named_scope("centroid_logits")
def centroid_logits(
    predicted: Float[Array, "B E"], centroids: Float[Array, "C E"], temperature: float
) -> Float[Array, "B C"]:
    """Cosine of every prediction with every centroid over a temperature, `[B, C]`."""
    return unit(predicted) @ unit(centroids).T / temperature


def cross_entropy(logits: Float[Array, "B C"], label: Int[Array, " B"]) -> Float[Array, " B"]:
    """`-log softmax` of the right class, in nats, `[B]`."""
    right = jnp.take_along_axis(logits, label[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - right

"""A router: which of K subspaces an answer lies in, differentiable in training (JASPER plan, task 9)."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

AtInference = Literal["softmax", "argmax"]


def gumbel_temperature(
    progress: Float[Array, ""] | float, start: float = 1.0, end: float = 0.1
) -> Float[Array, ""]:
    """Temperature of the Gumbel-softmax: half a cosine from `start` to `end` over the run."""
    turned = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(jnp.asarray(progress, jnp.float32), 0.0, 1.0)))
    return end + (start - end) * turned


def gumbel_softmax(
    logits: Float[Array, "B K"],
    temperature: Float[Array, ""] | float,
    key: Key[Array, ""],
    *,
    straight_through: bool = False,
) -> Float[Array, "B K"]:
    """A random choice that passes a gradient on (arXiv 1611.01144); rows sum to 1.

    Args:
        logits: Unnormalised log-probabilities, `[B, K]`.
        temperature: The lower, the nearer to a single choice.
        key: Source of the noise.
        straight_through: Choose exactly one, and let the gradient pass as if the choice were soft.
    """
    soft = jax.nn.softmax((logits + jax.random.gumbel(key, logits.shape)) / temperature, axis=-1)
    return one_hot_forward(soft) if straight_through else soft


def routing_weights(logits: Float[Array, "B K"], how: AtInference) -> Float[Array, "B K"]:
    """Weights of the subspaces when predicting: without noise, rows sum to 1."""
    soft = jax.nn.softmax(logits, axis=-1)
    if how == "softmax":
        return soft
    return (jnp.arange(logits.shape[-1]) == jnp.argmax(soft, axis=-1)[:, None]).astype(soft.dtype)


def one_hot_forward(soft: Float[Array, "B K"]) -> Float[Array, "B K"]:
    """The largest weight as 1 and the others as 0, with the gradient of the soft weights."""
    hard = jax.nn.one_hot(jnp.argmax(soft, axis=-1), soft.shape[-1])
    return soft + jax.lax.stop_gradient(hard - soft)

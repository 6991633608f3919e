"""What a prediction is added to, and how far it may move it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.named_scope("mixed_turns")
def mixed_turns(
    context: Float[Array, "B N D"],
    context_mask: Bool[Array, "B N"],
    age_logits: Float[Array, " max_context_length"],
    content_logits: Float[Array, "B N"],
) -> Float[Array, "B D"]:
    """A weighted sum of the turns, where softplus(age + content) is a turn's weight.

    Args:
        context: Turn embeddings, oldest first, `[B, N, D]`; finite where the mask leaves them out.
        context_mask: True where a turn is real, `[B, N]`.
        age_logits: By how many real turns came after, 0 for the newest, `[max_context_length]`.
        content_logits: What the model reads in each turn, `[B, N]`.
    """
    age = ages(context_mask)
    weights = jnp.where(context_mask, jax.nn.softplus(age_logits[age] + content_logits), 0.0)
    return jnp.einsum("bn,bnd->bd", weights, context)


def ages(context_mask: Bool[Array, "B N"]) -> Int[Array, "B N"]:
    """How many real turns came after each turn, `[B, N]`: 0 for the newest."""
    return jnp.sum(context_mask, axis=1, keepdims=True) - jnp.cumsum(context_mask, axis=1)


def capped(delta: Float[Array, "B E"], max_delta: float | None) -> Float[Array, "B E"]:
    """`delta`, shortened to a norm of `max_delta` where it is longer."""
    if max_delta is None:
        return delta
    squared = jnp.sum(delta * delta, axis=-1, keepdims=True)
    return delta * jnp.minimum(1.0, max_delta / jnp.sqrt(jnp.maximum(squared, 1e-24)))

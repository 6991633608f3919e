"""What models that take embeddings are called with, and what they refuse."""

from typing import Any

import jax
import jax.numpy as jnp

from prime_jax.errors import PredictorError


def embedding_inputs(batch: int, turns: int, dim: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of context, query and context mask, by argument name."""
    return {
        "context": jax.ShapeDtypeStruct((batch, turns, dim), jnp.float32),
        "query": jax.ShapeDtypeStruct((batch, dim), jnp.float32),
        "context_mask": jax.ShapeDtypeStruct((batch, turns), jnp.bool_),
    }


def check_inputs(context: Any, query: Any, context_mask: Any, *, dim: int, most: int) -> None:
    """Check shapes only, so that it costs nothing under jit.

    Args:
        context: Turns, to be `[B, N, D]`.
        query: Queries, to be `[B, D]`.
        context_mask: To be `[B, N]`, or None.
        dim: Dimension D that the model takes.
        most: Most turns N.

    Raises:
        PredictorError: If a shape does not fit.
    """
    if context.ndim != 3 or query.ndim != 2:
        raise PredictorError(
            f"context must have shape [B, N, D] and query [B, D], got {context.shape} and {query.shape}"
        )
    if context.shape[2] != dim:
        raise PredictorError(f"context has dimension {context.shape[2]}, the model takes {dim}")
    if query.shape != (context.shape[0], dim):
        raise PredictorError(
            f"query has shape {query.shape}, expected ({context.shape[0]}, {dim}) to go with the context"
        )
    if context.shape[1] > most:
        raise PredictorError(
            f"context has {context.shape[1]} turns, the model takes at most {most}; pass the newest ones"
        )
    if context_mask is not None and context_mask.shape != context.shape[:2]:
        raise PredictorError(f"context_mask has shape {context_mask.shape}, expected {context.shape[:2]}")

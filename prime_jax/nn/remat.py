"""What the backward pass computes anew instead of keeping it (FR-PRED-010)."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Remat = Literal["none", "blocks", "dots"]


def rematerialised(block: Callable[..., Any], policy: Remat) -> Callable[..., Any]:
    """A block that keeps for the backward pass what `policy` says.

    `none` keeps every activation. `dots` keeps the results of matrix products with weights and recomputes
    what is cheap between them. `blocks` keeps the block's input alone: least memory, a third more work.
    """
    if policy == "none":
        return block
    if policy == "dots":
        return jax.checkpoint(block, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    return jax.checkpoint(block)


def keeping_inputs(
    cheap: Callable[..., Any], dtype: DTypeLike, *, rounded: bool = False
) -> Callable[..., Any]:
    """What lies between two products (a norm, an activation) for a model that computes in `dtype`.

    In bfloat16 the backward pass keeps the function's inputs alone and computes it anew: activations are
    written in float32 nowhere, and a GPU is bound by such traffic. float32 keeps what JAX keeps by itself.

    Args:
        cheap: The function; float32 out.
        dtype: Compute dtype of the model.
        rounded: Give the result in `dtype`, for a product that would round it first thing. Its gradient is
            then handed on as the product's backward pass stores it, and not written again in float32; where
            several products read it, their gradients are summed in `dtype`.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return cheap
    return jax.checkpoint(lambda *given: cheap(*given).astype(dtype)) if rounded else jax.checkpoint(cheap)

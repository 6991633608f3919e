"""What the backward pass computes anew instead of keeping it (FR-PRED-010)."""

from collections.abc import Callable
from typing import Any, Literal

import jax

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

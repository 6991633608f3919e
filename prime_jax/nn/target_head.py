"""A trainable map of the target space: what lies between the frozen encoder and what is searched.

`unit(y + y @ kernel)` with a kernel that starts at zero, so that training starts at the encoder's own space.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from prime_jax.nn.linear import einsum_accumulate_f32, unit


def initial_head(dim: int) -> Float[Array, "E E"]:
    """The kernel that changes nothing."""
    return jnp.zeros((dim, dim))


@jax.named_scope("target_head")
def apply_head(kernel: Float[Array, "E E"], targets: Float[Array, "*a E"]) -> Float[Array, "*a E"]:
    """Targets as the head maps them, unit norm, float32."""
    return unit(targets + einsum_accumulate_f32("...i,io->...o", targets, kernel, jnp.float32))


def ema(average: Array, latest: Array, decay: Float[Array, ""]) -> Array:
    """Exponential moving average, without a gradient; what does not change stays exactly as it is."""
    return average + (1 - decay) * (jax.lax.stop_gradient(latest) - average)


def ema_decay(start: float, end: float, progress: Float[Array, ""]) -> Float[Array, ""]:
    """From `start` to `end` on half a cosine as `progress` goes from 0 to 1 (JASPER: 0.996 to 0.999)."""
    return end - (end - start) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))


class MappedRows:
    """A memory that is read from elsewhere in parts, each mapped by a trained head when it is asked for."""

    dtype, ndim = np.dtype(np.float32), 2

    def __init__(self, kernel: Float[Array, "E E"], rows: Any):
        self._kernel, self._rows = kernel, rows
        self.shape = rows.shape

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, wanted: Any) -> Float32[np.ndarray, "*a E"]:
        return np.asarray(apply_head(self._kernel, jnp.asarray(self._rows[wanted])))


def map_memory(kernel: Float[Array, "E E"], embeddings: Any, rows: int = 65536) -> Any:
    """Passages of a memory as a trained head maps them: what its predictions search.

    An array gives an array `[M, E]`, made some rows at a time; what is read in parts is mapped in parts.
    """
    if not isinstance(embeddings, np.ndarray):
        return MappedRows(kernel, embeddings)
    starts = range(0, len(embeddings), rows)
    parts = [apply_head(kernel, jnp.asarray(embeddings[start : start + rows])) for start in starts]
    return np.concatenate([np.asarray(part) for part in parts]) if parts else embeddings

"""A trainable map of the target space: what lies between the frozen encoder and what is searched.

`unit(y + y @ kernel)` with a kernel that starts at zero, so that training starts at the encoder's own space.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from prime_jax.nn.linear import product, unit


def initial_head(dim: int) -> Float[Array, "E E"]:
    """The kernel that changes nothing."""
    return jnp.zeros((dim, dim))


def apply_head(kernel: Float[Array, "E E"], targets: Float[Array, "*a E"]) -> Float[Array, "*a E"]:
    """Targets as the head maps them, unit norm, float32."""
    return unit(targets + product("...i,io->...o", targets, kernel, jnp.float32))


def ema(average: Array, latest: Array, decay: Float[Array, ""]) -> Array:
    """Exponential moving average: `decay * average + (1 - decay) * latest`, without a gradient."""
    return decay * average + (1 - decay) * jax.lax.stop_gradient(latest)


def ema_decay(start: float, end: float, progress: Float[Array, ""]) -> Float[Array, ""]:
    """From `start` to `end` on half a cosine as `progress` goes from 0 to 1 (JASPER: 0.996 to 0.999)."""
    return end - (end - start) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))


def map_memory(
    kernel: Float[Array, "E E"], embeddings: Float32[np.ndarray, "M E"], rows: int = 65536
) -> Float32[np.ndarray, "M E"]:
    """Passages of a memory as a trained head maps them, some rows at a time: what its predictions search."""
    starts = range(0, len(embeddings), rows)
    parts = [apply_head(kernel, jnp.asarray(embeddings[start : start + rows])) for start in starts]
    return np.concatenate([np.asarray(part) for part in parts]) if parts else embeddings

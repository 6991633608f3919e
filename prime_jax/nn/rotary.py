"""Rotary position embedding (RoFormer, arXiv 2104.09864) with the frequency scaling of Llama 3.

Positions enter attention as rotations of queries and keys, so that a product of the two depends on how far
apart they are. Angles are tables made once on the host; a program only looks rows up.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
import pydantic
from jaxtyping import Array, Float, Float64, Int

from prime_jax.frozen import Frozen


class RopeScaling(Frozen):
    """Llama 3's stretching of low frequencies, by the names of a Hugging Face config.json."""

    rope_type: Literal["llama3"] = pydantic.Field(default="llama3", description="kind of scaling")
    factor: float = pydantic.Field(ge=1, description="how much longer the longest waves become")
    low_freq_factor: float = pydantic.Field(gt=0, description="waves longer than original / this are scaled")
    high_freq_factor: float = pydantic.Field(gt=0, description="waves shorter than original / this are not")
    original_max_position_embeddings: int = pydantic.Field(ge=1, description="tokens of the first training")

    @pydantic.model_validator(mode="after")
    def _low_below_high(self) -> "RopeScaling":
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor} must be below high_freq_factor "
                f"{self.high_freq_factor}"
            )
        return self


class Rotation(NamedTuple):
    """Cosine and sine of every token's angles, `[B, S, head_dim / 2]` each."""

    cos: Float[Array, "B S half"]
    sin: Float[Array, "B S half"]


class RotaryTable(NamedTuple):
    """Cosine and sine of every position's angles, float32 `[P, head_dim / 2]` each, in host memory."""

    cos: Float[np.ndarray, "P half"]
    sin: Float[np.ndarray, "P half"]

    def at(self, positions: Int[Array, "B S"]) -> Rotation:
        """The rotations of tokens at these positions."""
        return Rotation(jnp.asarray(self.cos)[positions], jnp.asarray(self.sin)[positions])


def rotary_table(
    positions: int, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> RotaryTable:
    """Angles of the positions 0 to `positions - 1`.

    Args:
        positions: P.
        head_dim: Width of an attention head, even.
        theta: Base of the frequencies.
        scaling: Llama 3's scaling, or None.
    """
    angles = np.arange(positions)[:, None] * frequencies(head_dim, theta, scaling)
    return RotaryTable(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Float64[np.ndarray, " half"]:
    """Radians per position of each pair of dimensions, `[head_dim / 2]`.

    Waves that are short against the first training length stay, long ones are stretched by `factor`, and
    those between are mixed of both (Llama 3.1, `rope_type: llama3`).
    """
    plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if scaling is None:
        return plain
    waves = scaling.original_max_position_embeddings * plain / (2 * np.pi)  # that fit in the first length
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = np.clip((waves - scaling.low_freq_factor) / span, 0.0, 1.0)
    return kept * plain + (1 - kept) * plain / scaling.factor


def rotate(x: Float[Array, "B S heads head_dim"], rotation: Rotation) -> Float[Array, "B S heads head_dim"]:
    """Turn dimension i of every head together with dimension i + head_dim / 2, as Llama pairs them."""
    cos, sin = (part[:, :, None, None] for part in rotation)
    halves = x.reshape(*x.shape[:-1], 2, -1)
    partners = halves[..., ::-1, :] * jnp.array([[-1.0], [1.0]])
    turned: Array = halves * cos + partners * sin
    return turned.reshape(x.shape)

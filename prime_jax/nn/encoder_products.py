"""Faster products for text encoders, where they are asked for: TF32, and fused attention in bfloat16.

`float32` means float32 everywhere. `tf32` rounds the factors of float32 products to 10 bits on devices that
have such products (NVIDIA from Ampere on; others compute in float32). `bfloat16` rounds them to 7 bits.
Sums are float32 in all three.
"""

from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from prime_jax.nn.linear import Linear, Projection, einsum_accumulate_f32

EncoderPrecision = Literal["float32", "tf32", "bfloat16"]

FUSED_FROM = 64  # tokens: a fused kernel works on blocks of as many, and wastes more of shorter texts


def dtype_of(precision: EncoderPrecision) -> np.dtype[Any]:
    """The dtype of a precision's factors."""
    dtype: np.dtype[Any] = jnp.dtype(jnp.bfloat16 if precision == "bfloat16" else jnp.float32)
    return dtype


def encoder_product(equation: str, left: Array, right: Array, dtype: DTypeLike, tf32: bool) -> Array:
    """`einsum` of two arrays cast to `dtype`, in float32; with `tf32` factors may be rounded to that."""
    if not tf32:
        return einsum_accumulate_f32(equation, left, right, dtype)
    return jnp.einsum(
        equation, left, right, precision=jax.lax.Precision.DEFAULT, preferred_element_type=jnp.float32
    )


class Tf32Linear(Linear):
    """An affine map in TF32 where the device has it, with the parameters of `Linear`."""

    def product(self, x: Float[Array, "*a I"]) -> Float[Array, "*a O"]:
        """The map without its bias."""
        return encoder_product("...i,io->...o", x, self.kernel[...], self.dtype, True)


class Tf32Projection(Projection):
    """A linear map in TF32 where the device has it, with the parameters of `Projection`."""

    def product(self, x: Float[Array, "*a I"]) -> Float[Array, "*a O"]:
        """The map."""
        return encoder_product("...i,io->...o", x, self.kernel[...], self.dtype, True)


def fused_attention(
    queries: Float[Array, "B S heads head_dim"],
    keys: Float[Array, "B S heads head_dim"],
    values: Float[Array, "B S heads head_dim"],
    lengths: Int[Array, " B"],
    dtype: DTypeLike,
) -> Float[Array, "B S H"]:
    """Scaled dot-product attention in one kernel that skips what is behind `lengths`, heads joined again.

    cuDNN's on a GPU (Dao et al. 2022, FlashAttention), elsewhere the same written out by JAX.

    Args:
        queries: `[B, S, heads, head_dim]`. Padded tokens ask too, so that their answers are numbers.
        keys: `[B, S, heads, head_dim]`.
        values: `[B, S, heads, head_dim]`.
        lengths: How many of each text's first tokens are real.
        dtype: Of the factors; on a GPU bfloat16.
    """
    mixed = jax.nn.dot_product_attention(
        queries.astype(dtype),
        keys.astype(dtype),
        values.astype(dtype),
        key_value_seq_lengths=jnp.maximum(lengths, 1).astype(jnp.int32),  # rows that only fill a batch have 0
        implementation="cudnn" if jax.default_backend() == "gpu" else "xla",
    )
    return mixed.astype(jnp.float32).reshape(*mixed.shape[:2], -1)


@cache
def has_fused_attention(heads: int, head_dim: int) -> bool:
    """Whether this process's GPU computes `fused_attention` of that shape: tried once on a small input."""
    if jax.default_backend() != "gpu":
        return False
    some = jnp.ones((1, FUSED_FROM, heads, head_dim), jnp.bfloat16)
    attend = jax.jit(lambda x: fused_attention(x, x, x, jnp.ones(1, jnp.int32), x.dtype))
    try:
        return bool(jnp.isfinite(attend(some)).all())
    except Exception:  # JAX, XLA and cuDNN each refuse in their own way
        return False

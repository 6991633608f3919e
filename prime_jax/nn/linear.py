"""Affine maps and dropout as the predictors use them.

Products run in the compute dtype and accumulate in float32; everything between them stays float32. On CPUs
this is what makes bfloat16 pay at all, and it keeps norms, softmax and GELU exact in every dtype.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key


def product(equation: str, left: Array, right: Array, dtype: DTypeLike) -> Array:
    """`einsum` of two arrays cast to `dtype`, accumulated and returned in float32.

    float32 means float32 on GPUs too, where the default would round the factors to TF32.
    """
    return jnp.einsum(
        equation,
        left.astype(dtype),
        right.astype(dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def affine(
    x: Float[Array, "*a I"], kernel: Float[Array, "I O"], bias: Float[Array, " O"], dtype: DTypeLike
) -> Float[Array, "*a O"]:
    """`x @ kernel + bias`, float32 out."""
    multiplied = jnp.matmul(
        x.astype(dtype),
        kernel.astype(dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return multiplied + bias.astype(jnp.float32)


def dropout(x: Array, rate: float, key: Key[Array, ""] | None) -> Array:
    """Inverted dropout; the identity when there is no key or the rate is zero.

    An element is decided by 16 random bits, half of what `jax.random.bernoulli` draws: on CPUs drawing them
    takes a fifth of a training step. The rate is thus rounded to a 65,536th, and the scale with it.
    """
    if key is None or rate == 0.0:
        return x
    dropped = round(rate * 2**16)
    width = x.shape[-1]
    words = jax.random.bits(key, (*x.shape[:-1], -(-width // 2)), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*x.shape[:-1], -1)[..., :width]
    return jnp.where(halves >= dropped, x * (2**16 / (2**16 - dropped)), 0.0)


def unit(x: Float[Array, "*a E"]) -> Float[Array, "*a E"]:
    """Scale to unit L2 norm as `torch.nn.functional.normalize` does; the gradient at zero is finite."""
    squared = jnp.sum(x * x, axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(squared, 1e-24))


class Linear(nnx.Module):
    """An affine map with Xavier-uniform kernel `[I, O]` and zero bias `[O]`."""

    def __init__(self, inputs: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.xavier_uniform()(rngs.params(), (inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*a I"]) -> Float[Array, "*a O"]:
        """Map the last axis."""
        return affine(x, self.kernel[...], self.bias[...], self.dtype)


class Projection(nnx.Module):
    """A linear map without bias: Xavier-uniform kernel `[I, O]`."""

    def __init__(self, inputs: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.xavier_uniform()(rngs.params(), (inputs, outputs)))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*a I"]) -> Float[Array, "*a O"]:
        """Map the last axis; float32 out."""
        return product("...i,io->...o", x, self.kernel[...], self.dtype)

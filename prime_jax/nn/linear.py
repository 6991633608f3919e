"""Affine maps and dropout as the predictors use them.

Products run in the compute dtype and accumulate in float32, forward and backward; norms, softmax and GELU
between them are float32. On CPUs this is what makes bfloat16 pay at all.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key


def einsum_accumulate_f32(
    equation: str, left: Array, right: Array, dtype: DTypeLike, result_dtype: DTypeLike = jnp.float32
) -> Array:
    """`einsum` of two arrays rounded to `dtype`, accumulated in float32, forward and backward.

    The gradient that comes in is rounded to `dtype` as well, so that its two products run at the rate of
    `dtype` and not at that of float32. With `dtype` float32 nothing is rounded, on GPUs neither, where the
    default would round to TF32.

    Inside `jax.shard_map` the gradient needs `check_vma=False`; under jit with shardings it needs nothing.

    Args:
        equation: Such as "mi,io->mo". Below float32 without an ellipsis and without a letter that one factor
            alone has, so that a factor's gradient is the einsum of the other with the result's gradient.
        left: First factor; where it is a float32 activation its gradient is stored in `result_dtype`.
        right: Second factor; where it is float32 (a weight) its gradient has float32 precision. The gradient
            of a factor that is in `dtype` already is in `dtype`.
        dtype: Compute dtype of the factors.
        result_dtype: What the result is stored in. float32 keeps all that was accumulated; `dtype` halves
            the memory traffic of large activations.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return _einsum(equation, left.astype(jnp.float32), right.astype(jnp.float32), jnp.float32)
    return _rounded_einsum(equation, left, right, jnp.dtype(dtype), jnp.dtype(result_dtype))


@partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def _rounded_einsum(
    equation: str, left: Array, right: Array, dtype: np.dtype, result_dtype: np.dtype
) -> Array:
    return _einsum(equation, left.astype(dtype), right.astype(dtype), result_dtype)


def _rounded_forward(
    equation: str, left: Array, right: Array, dtype: np.dtype, result_dtype: np.dtype
) -> tuple[Array, tuple[Any, ...]]:
    rounded = left.astype(dtype), right.astype(dtype)
    like = jnp.zeros((), left.dtype), jnp.zeros((), right.dtype)  # the dtypes their gradients must have
    return _einsum(equation, *rounded, result_dtype), (*rounded, *like)


def _rounded_backward(
    equation: str,
    dtype: np.dtype,
    result_dtype: np.dtype,
    residuals: tuple[Any, ...],
    gradient: Array,
) -> tuple[Array, Array]:
    left, right, like_left, like_right = residuals
    factors, result = equation.split("->")
    of_left, of_right = factors.split(",")
    rounded = gradient.astype(dtype)
    stored_left = dtype if like_left.dtype == dtype else result_dtype  # not in float32 to be rounded next
    stored_right = dtype if like_right.dtype == dtype else jnp.float32
    to_left = _einsum(f"{result},{of_right}->{of_left}", rounded, right, stored_left)
    to_right = _einsum(f"{of_left},{result}->{of_right}", left, rounded, stored_right)
    return to_left.astype(like_left.dtype), to_right.astype(like_right.dtype)


_rounded_einsum.defvjp(_rounded_forward, _rounded_backward)


def _einsum(equation: str, left: Array, right: Array, result_dtype: DTypeLike) -> Array:
    """`einsum` of two factors that are in the compute dtype already."""

    def multiply(left: Array, right: Array) -> Array:
        return jnp.einsum(
            equation, left, right, precision=jax.lax.Precision.HIGHEST, preferred_element_type=result_dtype
        )

    def in_float32(left: Array, right: Array) -> Array:
        return multiply(left.astype(jnp.float32), right.astype(jnp.float32)).astype(result_dtype)

    factors, result = equation.split("->")
    batched = set.intersection(*map(set, (*factors.split(","), result))) - {"."}
    if left.dtype == jnp.float32 or not batched:
        return multiply(left, right)
    # XLA:CPU has no bfloat16 kernel for some products with batch axes; the same numbers, as float32.
    product: Array = jax.lax.platform_dependent(left, right, cpu=in_float32, default=multiply)
    return product


def multiply(
    x: Float[Array, "*a I"],
    kernel: Float[Array, "I O"],
    dtype: DTypeLike,
    result_dtype: DTypeLike = jnp.float32,
) -> Float[Array, "*a O"]:
    """`x @ kernel` by `einsum_accumulate_f32`, in `result_dtype`."""
    if jnp.dtype(dtype) == jnp.float32:
        return jnp.matmul(
            x.astype(jnp.float32),
            kernel.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
    flat = einsum_accumulate_f32("mi,io->mo", x.reshape(-1, x.shape[-1]), kernel, dtype, result_dtype)
    return flat.reshape(*x.shape[:-1], kernel.shape[1])


def affine(
    x: Float[Array, "*a I"],
    kernel: Float[Array, "I O"],
    bias: Float[Array, " O"],
    dtype: DTypeLike,
    result_dtype: DTypeLike = jnp.float32,
) -> Float[Array, "*a O"]:
    """`x @ kernel + bias`, float32 out; the product is stored in `result_dtype` before the bias is added."""
    product = multiply(x, kernel, dtype, result_dtype)
    return product.astype(jnp.float32) + bias.astype(jnp.float32)


def dropout(x: Array, rate: float, key: Key[Array, ""] | None) -> Array:
    """Inverted dropout; the identity when there is no key or the rate is zero.

    An element is decided by 16 random bits, half of what `jax.random.bernoulli` draws: on CPUs drawing them
    takes a fifth of a training step. The rate is thus rounded to a 65,536th, and the scale with it.
    """
    return dropped_out(x, rate, keep_mask(x.shape, rate, key))


def keep_mask(shape: tuple[Any, ...], rate: float, key: Key[Array, ""] | None) -> Bool[Array, "*a"] | None:
    """Which elements dropout keeps; None for all of them. Sizes are symbols while a model is exported."""
    if key is None or rate == 0.0:
        return None
    width = shape[-1]
    words = jax.random.bits(key, (*shape[:-1], -(-width // 2)), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*shape[:-1], -1)[..., :width]
    return halves >= round(rate * 2**16)


def dropped_out(x: Array, rate: float, mask: Bool[Array, "*a"] | None) -> Array:
    """What dropout leaves of `x`, scaled so that the mean stays."""
    if mask is None:
        return x
    return jnp.where(mask, x * (2**16 / (2**16 - round(rate * 2**16))), 0.0)


def gelu(x: Float[Array, "*a"], dtype: DTypeLike) -> Float[Array, "*a"]:
    """Exact GELU of float32 numbers, for a model that computes in `dtype`.

    `jax.nn.gelu` takes `erfc`, which stays precise where the answer is next to nothing and takes twice as
    long. With `erf` the answer differs by at most 1e-6, far less than its rounding for the next product.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return jax.nn.gelu(x, approximate=False)
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


def unit(x: Float[Array, "*a E"]) -> Float[Array, "*a E"]:
    """Scale to unit L2 norm as `torch.nn.functional.normalize` does; the gradient at zero is finite."""
    squared = jnp.sum(x * x, axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(squared, 1e-24))


class Projection(nnx.Module):
    """A linear map without bias: Xavier-uniform kernel `[I, O]`.

    Args:
        inputs: I.
        outputs: O.
        dtype: Compute dtype of the product.
        result_dtype: What the product is stored in; None for float32.
        rngs: Source of the initial weights.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        dtype: DTypeLike,
        result_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(nnx.initializers.xavier_uniform()(rngs.params(), (inputs, outputs)))
        self.dtype = dtype
        self.result_dtype = jnp.float32 if result_dtype is None else result_dtype

    def __call__(self, x: Float[Array, "*a I"]) -> Float[Array, "*a O"]:
        """Map the last axis; float32 out."""
        return self.product(x).astype(jnp.float32)

    def product(self, x: Float[Array, "*a I"]) -> Float[Array, "*a O"]:
        """The product as it is stored, without a bias."""
        return multiply(x, self.kernel[...], self.dtype, self.result_dtype)


class Linear(Projection):
    """An affine map: a `Projection` and a bias `[O]` that starts at zero and is added in float32."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        dtype: DTypeLike,
        result_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(inputs, outputs, dtype=dtype, result_dtype=result_dtype, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: Float[Array, "*a I"]) -> Float[Array, "*a O"]:
        """Map the last axis; float32 out."""
        return super().__call__(x) + self.bias[...].astype(jnp.float32)

"""A stack of affine maps as JASPER's encoders, head and router use it."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

from prime_jax.nn.blocks import layer_norm
from prime_jax.nn.linear import Linear, dropped_out, keep_mask
from prime_jax.nn.remat import keeping_inputs


class MLP(nnx.Module):
    """Blocks of Linear, exact GELU, LayerNorm and dropout, each `width` wide (JASPER plan, task 1)."""

    def __init__(
        self, inputs: int, width: int, blocks: int, rate: float, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        sizes = [inputs] + [width] * (blocks - 1)
        self.linears = nnx.List(
            Linear(size, width, dtype=dtype, result_dtype=dtype, rngs=rngs) for size in sizes
        )
        self.norms = nnx.List(layer_norm(width, rngs) for _ in sizes)
        self.rate = rate
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*a I"], key: Key[Array, ""] | None = None) -> Float[Array, "*a H"]:
        """Map the last axis; a key turns dropout on."""
        for index, (linear, norm) in enumerate(zip(self.linears, self.norms, strict=True)):
            fresh = None if key is None else jax.random.fold_in(key, index)
            product = linear.product(x)

            def between(
                product: Array, bias: Array, mask: Bool[Array, "*a H"] | None, norm: nnx.LayerNorm = norm
            ) -> Array:
                active = jax.nn.gelu(product.astype(jnp.float32) + bias, approximate=False)
                return dropped_out(norm(active), self.rate, mask)

            mask = keep_mask(product.shape, self.rate, fresh)
            x = keeping_inputs(between, self.dtype)(product, linear.bias[...], mask)
        return x

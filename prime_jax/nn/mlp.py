"""A stack of affine maps as JASPER's encoders, head and router use it."""

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from prime_jax.nn.blocks import layer_norm
from prime_jax.nn.linear import Linear, dropout


class MLP(nnx.Module):
    """Blocks of Linear, exact GELU, LayerNorm and dropout, each `width` wide (JASPER plan, task 1)."""

    def __init__(
        self, inputs: int, width: int, blocks: int, rate: float, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        sizes = [inputs] + [width] * (blocks - 1)
        self.linears = nnx.List(Linear(size, width, dtype=dtype, rngs=rngs) for size in sizes)
        self.norms = nnx.List(layer_norm(width, rngs) for _ in sizes)
        self.rate = rate

    def __call__(self, x: Float[Array, "*a I"], key: Key[Array, ""] | None = None) -> Float[Array, "*a H"]:
        """Map the last axis; a key turns dropout on."""
        for index, (linear, norm) in enumerate(zip(self.linears, self.norms, strict=True)):
            fresh = None if key is None else jax.random.fold_in(key, index)
            x = dropout(norm(jax.nn.gelu(linear(x), approximate=False)), self.rate, fresh)
        return x

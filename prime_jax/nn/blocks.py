"""The transformer block of the embedding predictor (spec section 9)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

from prime_jax.nn.attention import SelfAttention
from prime_jax.nn.linear import Linear, dropout, dropped_out, gelu, keep_mask
from prime_jax.nn.remat import keeping_inputs

NORM_EPSILON = 1e-5  # torch's default, so that exported weights mean the same there


def layer_norm(hidden_dim: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm in float32 with torch's epsilon."""
    return nnx.LayerNorm(hidden_dim, epsilon=NORM_EPSILON, dtype=jnp.float32, rngs=rngs)


class PredictorTransformerBlock(nnx.Module):
    """Pre-norm block: `x + attention(norm1(x))`, then `x + mlp(norm2(x))` with an exact GELU, 4 H wide."""

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        dropout: float = 0.1,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.norm1 = layer_norm(hidden_dim, rngs)
        self.attention = SelfAttention(hidden_dim, num_heads, dropout, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(hidden_dim, rngs)
        self.mlp_in = Linear(hidden_dim, 4 * hidden_dim, dtype=dtype, result_dtype=dtype, rngs=rngs)
        self.mlp_out = Linear(4 * hidden_dim, hidden_dim, dtype=dtype, result_dtype=dtype, rngs=rngs)
        self.rate = dropout
        self.dtype = dtype

    def __call__(
        self,
        x: Float[Array, "B S H"],
        mask: Bool[Array, "B S S"],
        *,
        rows: int | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B R H"]:
        """Transform the first `rows` tokens (None: all), letting them look at all tokens the mask allows.

        Args:
            x: Tokens, `[B, S, H]`.
            mask: True where a row token may look at a column token, `[B, S, S]`.
            rows: How many leading tokens to compute; the last layer needs only [PRED].
            key: Dropout key; None means no dropout.
        """
        keys = jax.random.split(key, 3) if key is not None else (None, None, None)
        residual = x if rows is None else x[:, :rows]
        normed = keeping_inputs(self.norm1, self.dtype, rounded=True)(x)
        residual = residual + self.attention(normed, mask, rows=rows, key=keys[0])
        expanded = self.mlp_in.product(keeping_inputs(self.norm2, self.dtype, rounded=True)(residual))
        inner = keeping_inputs(self._activate, self.dtype, rounded=True)(
            expanded, self.mlp_in.bias[...], keep_mask(expanded.shape, self.rate, keys[1])
        )
        return residual + dropout(self.mlp_out(inner), self.rate, keys[2])

    def _activate(
        self, x: Float[Array, "B R I"], bias: Float[Array, " I"], mask: Bool[Array, "B R I"] | None
    ) -> Float[Array, "B R I"]:
        """Exact GELU of `x + bias`, and dropout; in float32."""
        return dropped_out(gelu(x.astype(jnp.float32) + bias, self.dtype), self.rate, mask)

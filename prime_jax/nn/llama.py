"""The transformer block of Llama: RMSNorm, grouped-query attention with rotary positions, and SwiGLU.

Touvron et al. 2023 (arXiv 2302.13971), Ainslie et al. 2023 (arXiv 2305.13245). It computes what
`transformers`' LlamaDecoderLayer does, under any mask instead of the causal one, so that pretrained weights
keep their meaning.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

from prime_jax.nn.attention import attend, split_heads
from prime_jax.nn.linear import Projection, dropout
from prime_jax.nn.remat import keeping_inputs
from prime_jax.nn.rotary import Rotation, rotate


class LlamaShape(NamedTuple):
    """Sizes of a block, by the names of the field.

    Attributes:
        hidden_dim: Width H of the tokens.
        num_heads: Heads that ask.
        num_kv_heads: Heads that are asked; each serves `num_heads / num_kv_heads` of those that ask.
        head_dim: Width of a head.
        mlp_dim: Width of the MLP.
        norm_eps: Epsilon of RMSNorm.
    """

    hidden_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    norm_eps: float


def rms_normalised(
    x: Float[Array, "*a H"], scale: Float[Array, " H"], epsilon: float
) -> Float[Array, "*a H"]:
    """`x` divided by its root mean square and scaled, in float32 (arXiv 1910.07467)."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon) * scale


def shared_heads(x: Float[Array, "B S kv head_dim"], num_heads: int) -> Float[Array, "B S heads head_dim"]:
    """Every head of keys or values once for each of the heads that share it."""
    batch, tokens, few, size = x.shape
    if few == num_heads:
        return x
    wide = jnp.broadcast_to(x[:, :, :, None], (batch, tokens, few, num_heads // few, size))
    return wide.reshape(batch, tokens, num_heads, size)


class RMSNorm(nnx.Module):
    """RMSNorm in float32 with a scale `[H]` that starts at one."""

    def __init__(self, hidden_dim: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(hidden_dim))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*a H"]) -> Float[Array, "*a H"]:
        """Normalise the last axis."""
        return rms_normalised(x, self.scale[...], self.epsilon)


def _swiglu(gate: Float[Array, "B R I"], up: Float[Array, "B R I"]) -> Float[Array, "B R I"]:
    return jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)


class LlamaBlock(nnx.Module):
    """Pre-norm block: `x + attention(norm1(x))`, then `x + down(silu(gate(norm2(x))) * up(norm2(x)))`.

    Args:
        shape: Sizes.
        rate: Dropout in training, of attention weights and of the MLP's answer; Llama itself has none.
        dtype: Compute dtype of the products.
        rngs: Source of the initial weights.
    """

    def __init__(self, shape: LlamaShape, rate: float, *, dtype: DTypeLike, rngs: nnx.Rngs):
        hidden, asking = shape.hidden_dim, shape.num_heads * shape.head_dim
        asked = shape.num_kv_heads * shape.head_dim
        self.norm1 = RMSNorm(hidden, shape.norm_eps)
        self.q_proj = Projection(hidden, asking, dtype=dtype, result_dtype=dtype, rngs=rngs)
        self.k_proj = Projection(hidden, asked, dtype=dtype, result_dtype=dtype, rngs=rngs)
        self.v_proj = Projection(hidden, asked, dtype=dtype, result_dtype=dtype, rngs=rngs)
        self.o_proj = Projection(asking, hidden, dtype=dtype, result_dtype=dtype, rngs=rngs)
        self.norm2 = RMSNorm(hidden, shape.norm_eps)
        self.gate_proj = Projection(hidden, shape.mlp_dim, dtype=dtype, result_dtype=dtype, rngs=rngs)
        self.up_proj = Projection(hidden, shape.mlp_dim, dtype=dtype, result_dtype=dtype, rngs=rngs)
        self.down_proj = Projection(shape.mlp_dim, hidden, dtype=dtype, result_dtype=dtype, rngs=rngs)
        self.num_heads, self.num_kv_heads = shape.num_heads, shape.num_kv_heads
        self.rate = rate
        self.dtype = dtype

    def __call__(
        self,
        x: Float[Array, "B S H"],
        mask: Bool[Array, "B S S"],
        rotation: Rotation,
        *,
        rows: int | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B R H"]:
        """Transform the first `rows` tokens (None: all), letting them look at all tokens the mask allows.

        Args:
            x: Tokens, `[B, S, H]`.
            mask: True where a row token may look at a column token, `[B, S, S]`.
            rotation: Angles of the tokens' positions.
            rows: How many leading tokens to compute; the last layer needs only [PRED].
            key: Dropout key; None means no dropout.
        """
        keys = jax.random.split(key, 2) if key is not None else (None, None)
        residual = x if rows is None else x[:, :rows]
        asking = Rotation(*(part[:, :rows] for part in rotation))
        normed = keeping_inputs(self.norm1, self.dtype, rounded=True)(x)
        queries = rotate(split_heads(self.q_proj(normed[:, :rows]), self.num_heads), asking)
        asked = rotate(split_heads(self.k_proj(normed), self.num_kv_heads), rotation)
        values = split_heads(self.v_proj(normed), self.num_kv_heads)
        mixed = attend(
            queries,
            shared_heads(asked, self.num_heads),
            shared_heads(values, self.num_heads),
            mask[:, :rows],
            self.dtype,
            rate=self.rate,
            key=keys[0],
        )
        residual = residual + self.o_proj(mixed)
        normed = keeping_inputs(self.norm2, self.dtype, rounded=True)(residual)
        inner = keeping_inputs(_swiglu, self.dtype, rounded=True)(
            self.gate_proj.product(normed), self.up_proj.product(normed)
        )
        return residual + dropout(self.down_proj(inner), self.rate, keys[1])

"""Multi-head self-attention under an explicit mask, with float32 softmax."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

from prime_jax.nn.linear import Linear, affine, dropped_out, einsum_accumulate_f32, keep_mask
from prime_jax.nn.remat import keeping_inputs

MASKED = -1e30  # finite, so that a row that sees nothing stays a number


def attend(
    queries: Float[Array, "B R heads head_dim"],
    keys: Float[Array, "B S heads head_dim"],
    values: Float[Array, "B S heads head_dim"],
    mask: Bool[Array, "B R S"],
    dtype: DTypeLike,
    *,
    rate: float = 0.0,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "B R H"]:
    """Scaled dot-product attention, heads joined again.

    Args:
        queries: What asks, `[B, R, heads, head_dim]`.
        keys: What is asked, `[B, S, heads, head_dim]`.
        values: What it answers, `[B, S, heads, head_dim]`.
        mask: True where a query may look at a key, `[B, R, S]`.
        dtype: Compute dtype of the two products.
        rate: Dropout of the attention weights.
        key: Dropout key; None means no dropout.
    """
    logits = einsum_accumulate_f32("bqhd,bkhd->bhqk", queries, keys, dtype)
    scale = jnp.sqrt(jnp.float32(queries.shape[-1]))

    def normalise(logits: Array, mask: Array, kept: Array | None) -> Array:
        weights = jax.nn.softmax(jnp.where(mask[:, None], logits / scale, MASKED), axis=-1)
        return dropped_out(weights, rate, kept)

    weights = keeping_inputs(normalise, dtype)(logits, mask, keep_mask(logits.shape, rate, key))
    mixed = einsum_accumulate_f32("bhqk,bkhd->bqhd", weights, values, dtype, dtype)
    return mixed.reshape(*mixed.shape[:2], -1).astype(jnp.float32)


def split_heads(x: Float[Array, "B S H"], num_heads: int) -> Float[Array, "B S heads head_dim"]:
    """Give every head its part of the last axis."""
    return x.reshape(*x.shape[:2], num_heads, -1)


class SelfAttention(nnx.Module):
    """Self-attention with the parameter layout of `torch.nn.MultiheadAttention`.

    One fused input projection for queries, keys and values, then an output projection (FR-PRED-004).
    """

    def __init__(self, hidden_dim: int, num_heads: int, rate: float, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.in_proj = Linear(hidden_dim, 3 * hidden_dim, dtype=dtype, result_dtype=dtype, rngs=rngs)
        self.out_proj = Linear(hidden_dim, hidden_dim, dtype=dtype, result_dtype=dtype, rngs=rngs)
        self.hidden_dim = hidden_dim
        self.num_heads = num_heads
        self.rate = rate
        self.dtype = dtype

    def __call__(
        self,
        x: Float[Array, "B S H"],
        mask: Bool[Array, "B S S"],
        *,
        rows: int | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B R H"]:
        """Attend from the first `rows` tokens (None: all of them) to all tokens.

        Args:
            x: Normalised tokens, `[B, S, H]`.
            mask: True where a row token may look at a column token, `[B, S, S]`.
            rows: How many leading tokens to compute an answer for.
            key: Dropout key for the attention weights; None means no dropout.
        """
        if rows is None:
            fused = jnp.split(self.in_proj(x), 3, axis=-1)
        else:  # the last layer asks for a few tokens only
            fused = [self._project(tokens, part) for part, tokens in enumerate((x[:, :rows], x, x))]
        queries, keys, values = (split_heads(part, self.num_heads) for part in fused)
        mixed = attend(queries, keys, values, mask[:, :rows], self.dtype, rate=self.rate, key=key)
        return self.out_proj(mixed)

    def _project(self, x: Float[Array, "B S H"], part: int) -> Float[Array, "B S H"]:
        columns = slice(part * self.hidden_dim, (part + 1) * self.hidden_dim)
        kernel, bias = self.in_proj.kernel[...][:, columns], self.in_proj.bias[...][columns]
        return affine(x, kernel, bias, self.dtype, self.dtype)

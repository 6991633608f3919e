"""Multi-head self-attention under an explicit mask, with float32 softmax."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

from prime_jax.devices import on_gpu
from prime_jax.nn.linear import Linear, affine, dropped_out, einsum_accumulate_f32, keep_mask
from prime_jax.nn.remat import keeping_inputs

JOINED_UP_TO = 512  # tokens times heads
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
    if jnp.dtype(dtype) != jnp.float32:  # as the products would; their gradients travel rounded as well
        queries, keys, values = (part.astype(dtype) for part in (queries, keys, values))
    joined = _heads_joined(queries, keys, dtype)
    logits = (_logits_joined if joined else _logits)(queries, keys, dtype)
    scale = jnp.sqrt(jnp.float32(queries.shape[-1]))

    def normalise(logits: Array, mask: Array, kept: Array | None) -> Array:
        weights = jax.nn.softmax(jnp.where(mask[:, None], logits / scale, MASKED), axis=-1)
        return dropped_out(weights, rate, kept)

    kept = keep_mask(logits.shape, rate, key)
    weights = keeping_inputs(normalise, dtype, rounded=True)(logits, mask, kept)
    mixed = (_mixed_joined if joined else _mixed)(weights, values, dtype)
    return mixed.reshape(*mixed.shape[:2], -1).astype(jnp.float32)


def _logits(queries: Array, keys: Array, dtype: DTypeLike) -> Float[Array, "B heads R S"]:
    return einsum_accumulate_f32("bqhd,bkhd->bhqk", queries, keys, dtype)


def _mixed(weights: Array, values: Array, dtype: DTypeLike) -> Float[Array, "B R heads head_dim"]:
    return einsum_accumulate_f32("bhqk,bkhd->bqhd", weights, values, dtype, dtype)


def _heads_joined(queries: Array, keys: Array, dtype: DTypeLike) -> bool:
    """Whether every token and head asks every token and head, and what other heads answered is dropped.

    So many more products for a few tokens, but each batch row is one product of matrices that lie in memory
    as they are. A GPU would turn and copy queries, keys and values otherwise, which takes longer.
    """
    if not on_gpu() or jnp.dtype(dtype) == jnp.float32 or not isinstance(keys.shape[1], int):
        return False  # numbers of tokens are symbols while a model is exported
    return queries.shape[1] > 1 and keys.shape[1] * keys.shape[2] <= JOINED_UP_TO


def _logits_joined(queries: Array, keys: Array, dtype: DTypeLike) -> Float[Array, "B heads R S"]:
    """`_logits` by one product of `[B, R heads, head_dim]` and `[B, S heads, head_dim]`."""
    batch, rows, heads, width = queries.shape
    asking, asked = queries.reshape(batch, -1, width), keys.reshape(batch, -1, width)
    every = einsum_accumulate_f32("bim,bjm->bij", asking, asked, dtype)
    every = every.reshape(batch, rows, heads, keys.shape[1], heads)
    own = jnp.eye(heads, dtype=bool)[:, None]
    return jnp.where(own, every, 0.0).sum(axis=4).transpose(0, 2, 1, 3)


def _mixed_joined(weights: Array, values: Array, dtype: DTypeLike) -> Float[Array, "B R heads head_dim"]:
    """`_mixed` by one product with weights `[B, R heads, S heads]` that are zero between heads.

    The backward pass makes these anew: kept, they would take as many times more memory as there are heads.
    """
    batch, heads, rows, tokens = weights.shape

    @jax.checkpoint
    def product(weights: Array, values: Array) -> Array:
        own = jnp.eye(heads, dtype=bool)[:, None]
        every = jnp.where(own, weights.transpose(0, 2, 1, 3)[..., None], 0)
        every = every.reshape(batch, rows * heads, tokens * heads)
        answered = values.reshape(batch, tokens * heads, -1)
        return einsum_accumulate_f32("bij,bjm->bim", every, answered, dtype, dtype)

    mixed: Array = product(weights, values)
    return mixed.reshape(batch, rows, heads, -1)


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

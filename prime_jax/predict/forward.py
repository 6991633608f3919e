"""The forward pass as it is compiled for predicting: the model's own mathematics on laid-out weights.

`forward` answers a batch from nothing. `advance` answers from a conversation's cache: it computes only what
is new, writes it into the cache, and gives what `forward` would give for the whole window. Both run the same
layers.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from prime_jax.devices import on_gpu
from prime_jax.models.prime import PredictorConfig
from prime_jax.models.residual import capped, mixed_turns
from prime_jax.nn.attention import attend, split_heads
from prime_jax.nn.blocks import NORM_EPSILON
from prime_jax.nn.linear import gelu, unit
from prime_jax.nn.llama import rms_normalised, shared_heads
from prime_jax.nn.masks import attention_mask, positions
from prime_jax.nn.rotary import Rotation, rotate
from prime_jax.predict.weights import Affine, Layer, Norm, Weights

Attention = Literal["float32", "bfloat16"]
"""The dtype of attention's two products."""

CPU_ROWS = 12
GPU_ROWS = 8


class Cache(NamedTuple):
    """What a batch of conversations keeps on the device. Slot i holds turn i of the window, oldest first.

    With `context_attention` prefix or causal these are the keys and values of the turns in every layer. With
    full they change with every query but in the first layer, so that one's input and projection are kept
    instead.

    Attributes:
        keys: `[B, N, heads, head_dim]` for each layer, turned to their positions; nothing with full.
        values: `[B, N, heads, head_dim]` for each layer; nothing with full.
        entering: The turns as they enter the first layer, `[B, N, H]`; full only.
        projected: Their input projection there, as wide as queries, keys and values (without queries where
            it is the last layer too); full only.
        window: The turns' embeddings, `[B, N, D]`; where the residual mixes them only.
        content: What the residual reads in each turn, `[B, N]`; likewise, with prefix or causal only.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    entering: Array | None
    projected: Array | None
    window: Array | None
    content: Array | None


def empty_cache(config: PredictorConfig, batch: int) -> Cache:
    """A cache without turns."""
    slots, hidden = (batch, config.max_context_length), config.hidden_dim
    heads = (*slots, config.kv_heads, config.head_size)
    full, copies = config.context_attention == "full", config.copies_turns
    layers = 0 if full else config.num_layers
    asking = 0 if config.num_layers == 1 else config.num_heads
    wide = (asking + 2 * config.kv_heads) * config.head_size
    return Cache(
        keys=tuple(jnp.zeros(heads) for _ in range(layers)),
        values=tuple(jnp.zeros(heads) for _ in range(layers)),
        entering=jnp.zeros((*slots, hidden)) if full else None,
        projected=jnp.zeros((*slots, wide)) if full else None,
        window=jnp.zeros((*slots, config.input_dim)) if copies else None,
        content=jnp.zeros(slots) if copies and not full else None,
    )


def forward(
    weights: Weights,
    context: Float[Array, "B N D"],
    query: Float[Array, "B D"],
    context_mask: Bool[Array, "B N"],
    *,
    config: PredictorConfig,
    attention: Attention,
) -> Float[Array, "B E"]:
    """Predict from whole windows; equal to the model's own call.

    Args:
        weights: Laid-out weights.
        context: Turns, `[B, N, D]`; padded slots may hold anything.
        query: Queries, `[B, D]`.
        context_mask: True where a turn is real, `[B, N]`.
        config: The model's configuration.
        attention: How attention is computed.
    """
    context = jnp.where(context_mask[..., None], context, 0.0)
    at = positions(context_mask)
    turns = _placed(affine(context, weights.context_proj), weights, at[:, 1:-1])
    x = _sequence(weights, turns, query, at[:, -1])
    mask = attention_mask(context_mask, config.context_attention)
    pred, entering_last, _, _ = _layers(weights, x, at, mask, config, attention)
    content = _content(weights, entering_last)
    return _answer(weights, pred, query, context, context_mask, content, config)


def advance(
    weights: Weights,
    cache: Cache,
    turns: Float[Array, "B P D"],
    start: Int[Array, " B"],
    count: Int[Array, " B"],
    query: Float[Array, "B D"],
    *,
    config: PredictorConfig,
    attention: Attention,
) -> tuple[Float[Array, "B E"], Cache]:
    """Add turns to conversations and predict, computing only what the cache does not hold.

    Args:
        weights: Laid-out weights.
        cache: The conversations so far; donated where compiled.
        turns: New turns of each conversation, padding behind them, `[B, P, D]`. With prefix attention a new
            turn changes all others, so P is 0, or N with `start` 0.
        start: How many turns each conversation holds in the cache, `[B]`.
        count: How many of `turns` are real, `[B]`; `start + count` is at most N.
        query: Queries, `[B, D]`.
        config: The model's configuration.
        attention: How attention is computed.

    Returns:
        The predictions `[B, E]` and the cache with the new turns.
    """
    most, new = config.max_context_length, turns.shape[1]
    fresh = jnp.arange(new) < count[:, None]
    slots = jnp.where(fresh, start[:, None] + jnp.arange(new), most)  # a slot outside is not written
    total = start + count
    held = jnp.arange(most) < total[:, None]
    turns = jnp.where(fresh[..., None], turns, 0.0)
    added = _placed(affine(turns, weights.context_proj), weights, slots + 1)
    at_query = total + 1
    if cache.window is not None:
        cache = cache._replace(window=_write(cache.window, slots, turns))
    if cache.entering is not None:
        first = weights.layers[0]
        entering = _write(cache.entering, slots, added)
        normed = _norm(added, first.norm1, config.norm_eps)
        projected = _write(cache.projected, slots, affine(normed, first.in_proj))
        cache = cache._replace(entering=entering, projected=projected)
        x = _sequence(weights, entering, query, at_query)
        at = _around(jnp.broadcast_to(jnp.arange(most) + 1, held.shape), at_query)
        mask = attention_mask(held, "full")
        pred, entering_last, _, _ = _layers(weights, x, at, mask, config, attention, projected=projected)
        content = _content(weights, entering_last)
    else:
        x = _sequence(weights, added, query, at_query)
        mask = _mask_over_slots(slots, held, config)
        pred, entering_last, keys, values = _layers(
            weights,
            x,
            _around(slots + 1, at_query),
            mask,
            config,
            attention,
            kept=(cache.keys, cache.values),
            slots=slots,
        )
        cache = cache._replace(keys=keys, values=values)
        if cache.content is not None:
            content = _content(weights, entering_last)
            cache = cache._replace(content=_write(cache.content, slots, content))
        content = cache.content
    return _answer(weights, pred, query, cache.window, held, content, config), cache


def affine(x: Float[Array, "*a I"], weights: Affine) -> Float[Array, "*a O"]:
    """`x @ kernel + bias`, float32 out; every product of a prediction goes through here.

    XLA:CPU's bfloat16 kernels take rows by the dozen: 64 rows cost more than 96 do, and one row goes through
    a slow general path. So rows are padded to two, or to a multiple of twelve. For GPUs XLA makes a sum
    of one row's product, which reads the matrix at a quarter of the rate of several rows: it is padded to
    `GPU_ROWS`.
    """
    rows = x.reshape(-1, x.shape[-1]).astype(weights.kernel.dtype)
    count = rows.shape[0]
    cpu_bfloat16 = weights.outputs_first and rows.dtype == jnp.bfloat16
    if cpu_bfloat16 and (count == 1 or count > CPU_ROWS):
        rows = jnp.pad(rows, ((0, 1 if count == 1 else -count % CPU_ROWS), (0, 0)))
    if count == 1 and on_gpu():
        rows = jnp.pad(rows, ((0, GPU_ROWS - 1), (0, 0)))
    multiplied: Array = jax.lax.dot_general(
        rows,
        weights.kernel,
        (((1,), (1 if weights.outputs_first else 0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    answer: Array = multiplied[:count].reshape(*x.shape[:-1], multiplied.shape[-1])
    return answer if weights.bias is None else answer + weights.bias


def _sequence(
    weights: Weights, turns: Float[Array, "B P H"], query: Float[Array, "B D"], at_query: Int[Array, " B"]
) -> Float[Array, "B T H"]:
    """[PRED], turns, query with their positions, as they enter the first layer."""
    pred = jnp.broadcast_to(weights.pred_token, (query.shape[0], 1, turns.shape[2]))
    pred = _placed(pred, weights, jnp.zeros((1, 1), jnp.int32))
    asked = _placed(affine(query, weights.query_proj), weights, at_query)
    return jnp.concatenate([pred, turns, asked[:, None]], axis=1)


def _placed(x: Float[Array, "*a H"], weights: Weights, at: Int[Array, "*b"]) -> Float[Array, "*a H"]:
    """Tokens with the embedding of their position, where positions are embeddings."""
    return x if weights.pos_embedding is None else x + weights.pos_embedding[at]


def _around(turns: Int[Array, "B P"], query: Int[Array, " B"]) -> Int[Array, "B T"]:
    """Positions of [PRED], turns and query."""
    pred = jnp.zeros_like(query[:, None])
    return jnp.concatenate([pred, turns.astype(query.dtype), query[:, None]], axis=1)


def _layers(
    weights: Weights,
    x: Float[Array, "B T H"],
    at: Int[Array, "B T"],
    mask: Bool[Array, "B T S"],
    config: PredictorConfig,
    attention: Attention,
    *,
    projected: Float[Array, "B N W"] | None = None,
    kept: tuple[tuple[Array, ...], tuple[Array, ...]] | None = None,
    slots: Int[Array, "B P"] | None = None,
) -> tuple[Array, Array, tuple[Array, ...], tuple[Array, ...]]:
    """Run all layers; the last one computes [PRED] only.

    Args:
        weights: Laid-out weights.
        x: [PRED], turns, query.
        at: Their positions.
        mask: Who sees whom; columns are the tokens of `x` or, with `kept`, [PRED], all slots, query.
        config: The model's configuration.
        attention: How attention is computed.
        projected: The first layer's input projection of the turns, where it is known.
        kept: Keys and values of each layer's slots.
        slots: Where the keys and values of the turns in `x` go.

    Returns:
        Rows of the last layer `[B, R, H]`, of which the first is [PRED]'s answer; the turns as they enter it,
        `[B, T - 2, H]`; and `kept`, updated.
    """
    keys_kept, values_kept = [], []
    table = config.rotary()
    rotation = None if table is None else table.at(at)
    asking_width, asked_width = config.num_heads * config.head_size, config.kv_heads * config.head_size
    entering = x[:, 1:-1]
    rows = -(-GPU_ROWS // x.shape[0]) if on_gpu() else 1  # of the last layer, of which [PRED]'s alone counts
    for index, layer in enumerate(weights.layers):
        entering = x[:, 1:-1]
        normed = _norm(x, layer.norm1, config.norm_eps)
        if index == 0 and projected is not None:
            ends = affine(normed[:, jnp.array([0, -1])], layer.in_proj)
            inputs = jnp.concatenate([ends[:, :1], projected, ends[:, 1:]], axis=1)
        else:
            inputs = affine(normed, layer.in_proj)
        asking, seen, turned = x, mask, rotation
        if layer.query is None:
            queries, inputs = jnp.split(inputs, (asking_width,), axis=-1)
        else:
            queries, asking, seen = affine(normed[:, :rows], layer.query), x[:, :rows], mask[:, :rows]
            turned = None if rotation is None else Rotation(rotation.cos[:, :rows], rotation.sin[:, :rows])
        keys, values = (
            split_heads(part, config.kv_heads) for part in jnp.split(inputs, (asked_width,), axis=-1)
        )
        queries = split_heads(queries, config.num_heads)
        if rotation is not None and turned is not None:
            queries, keys = rotate(queries, turned), rotate(keys, rotation)
        if kept is not None and slots is not None:
            held = (
                _write(kept[0][index], slots, keys[:, 1:-1]),
                _write(kept[1][index], slots, values[:, 1:-1]),
            )
            keys_kept.append(held[0])
            values_kept.append(held[1])
            keys = jnp.concatenate([keys[:, :1], held[0], keys[:, -1:]], axis=1)
            values = jnp.concatenate([values[:, :1], held[1], values[:, -1:]], axis=1)
        keys, values = (shared_heads(part, config.num_heads) for part in (keys, values))
        mixed = attend(queries, keys, values, seen, jnp.dtype(attention))
        x = _mlp(asking + affine(mixed, layer.out_proj), layer, config.norm_eps)
    return x, entering, tuple(keys_kept), tuple(values_kept)


def _mlp(x: Float[Array, "B R H"], layer: Layer, epsilon: float) -> Float[Array, "B R H"]:
    normed = _norm(x, layer.norm2, epsilon)
    inner = affine(normed, layer.mlp_in)
    if layer.mlp_gate is None:
        inner = gelu(inner, layer.mlp_in.kernel.dtype)
    else:
        inner = jax.nn.silu(affine(normed, layer.mlp_gate)) * inner
    return x + affine(inner, layer.mlp_out)


def _norm(x: Float[Array, "*a H"], norm: Norm, epsilon: float) -> Float[Array, "*a H"]:
    """LayerNorm with torch's epsilon, or RMSNorm with the model's."""
    if norm.bias is None:
        return rms_normalised(x, norm.scale, epsilon)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + NORM_EPSILON) * norm.scale + norm.bias


def _mask_over_slots(
    slots: Int[Array, "B P"], held: Bool[Array, "B N"], config: PredictorConfig
) -> Bool[Array, "B T S"]:
    """Rows [PRED], new turns, query; columns [PRED], slots, query. Turns see turns only."""
    among = jnp.broadcast_to(held[:, None], (*slots.shape, held.shape[1]))
    if config.context_attention == "causal":
        among = among & (jnp.arange(held.shape[1]) <= slots[..., None])
    turns = jnp.pad(among, ((0, 0), (0, 0), (1, 1)))
    everything = jnp.pad(held, ((0, 0), (1, 1)), constant_values=True)[:, None]
    return jnp.concatenate([everything, turns, everything], axis=1)


def _write(buffer: Array | None, slots: Int[Array, "B P"], values: Array | None) -> Array:
    """Put `values [B, P, ...]` into `buffer [B, N, ...]`; a slot N is nowhere."""
    assert buffer is not None
    assert values is not None
    if values.shape[1] == 0:
        return buffer
    rows = jnp.arange(buffer.shape[0])[:, None]
    return buffer.at[rows, slots].set(values, mode="drop")


def _content(weights: Weights, entering_last: Float[Array, "B P H"]) -> Float[Array, "B P"] | None:
    if weights.residual is None or weights.residual.content is None:
        return None
    return entering_last @ weights.residual.content


def _answer(
    weights: Weights,
    pred: Float[Array, "B R H"],
    query: Float[Array, "B D"],
    window: Float[Array, "B N D"] | None,
    held: Bool[Array, "B N"],
    content: Float[Array, "B N"] | None,
    config: PredictorConfig,
) -> Float[Array, "B E"]:
    """[PRED]'s answer (the first row), projected, added to the residual and normalised."""
    delta = affine(_norm(pred, weights.norm, config.norm_eps), weights.output_proj)
    residual = weights.residual
    if residual is None:
        return unit(delta)[:, 0]
    base, delta = query, residual.gate * delta[:, 0]
    if residual.age is not None and content is not None and window is not None:
        mix = mixed_turns(window, held, residual.age, content)
        base = query + mix
        if residual.linear is not None:
            delta = delta + affine(jnp.concatenate([query, mix], axis=1), residual.linear)
    return unit(base + capped(delta, config.max_delta))

"""The compiled steps of exact search: scores of one tile of the corpus, its best rows, the best rows so far.

Scores are inner products in float32. Where the corpus is float16 and the device multiplies halves fastest, a
float32 query is split into two halves whose sum it is (`split_queries`), so that both products run at the
speed of float16 and nothing but the float32 accumulation rounds.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float16, Float32, Int32

AXIS = "rows"  # name of the axis of devices
TOP = (
    14  # exponent that a split query's largest value gets: far from overflow, and its low half from underflow
)


def split_queries(
    queries: Float32[np.ndarray, "q E"],
) -> tuple[Float16[np.ndarray, "2 q E"], Int32[np.ndarray, " q"]]:
    """Each query as the sum of two float16 vectors, after scaling by a power of two.

    Of a value x of a scaled query the high half keeps 11 bits and the low half the next 11, so
    `|x - (high + low)| <= max(2^-22 |x|, 2^-25)`, and the query's largest value is 2^13 or more. Against the
    score in exact arithmetic a query q and a corpus row c lose `2^-22 sum|q c| + 2^-38 max|q| sum|c|` by it,
    no more than a float32 sum of four products may lose.

    Returns:
        The halves, and the exponent by which scores have to be multiplied again (`ldexp`).
    """
    exponent = np.frexp(np.abs(queries).max(axis=1, initial=0.0))[1] - TOP
    scaled = np.ldexp(queries, -exponent[:, None])
    high = scaled.astype(np.float16)
    low = (scaled - high.astype(np.float32)).astype(np.float16)
    return np.stack([high, low]), exponent.astype(np.int32)


def magnitude(values: Any) -> Any:
    """Bits of the largest absolute value of an array of numpy or JAX; NaN and Inf are larger than numbers.

    Taken as integers, for a maximum of floats may pass over NaN, and numpy's of float16 is 50 times slower.
    """
    half = values.dtype == np.float16
    signed, unsigned, sign = (np.int16, np.uint16, 0x8000) if half else (np.int32, np.uint32, 0x80000000)
    positive = values.view(signed).max(initial=signed(0))
    any_sign = values.view(unsigned).max(initial=unsigned(0))  # a negative one, where there is any
    xp = np if isinstance(values, np.ndarray) else jnp
    return xp.maximum(positive.astype(unsigned), any_sign & unsigned(sign - 1))


device_magnitude = jax.jit(magnitude)


def exact_top_k(scores: Float32[Array, "q m"], k: int) -> tuple[Float32[Array, "q k"], Int32[Array, "q k"]]:
    """`jax.lax.top_k`, equal to the bit, by way of the k groups of neighbours with the largest maxima.

    A value outside of these groups has k values before it, their maxima: each is larger, or as large and
    further left. So one pass of maxima and two small top_k do instead of a large one.
    """
    columns = scores.shape[1]
    size = 1 << max(0, int((columns / k) ** 0.5).bit_length() - 1)  # about the least work after the maxima
    if size < 4 or columns % size:
        values, positions = jax.lax.top_k(scores, k)
        return values, positions.astype(jnp.int32)
    grouped = scores.reshape(-1, columns // size, size)
    groups = jnp.sort(jax.lax.top_k(grouped.max(axis=2), k)[1], axis=1)  # in order: ties go to the left
    members = jnp.take_along_axis(grouped, groups[:, :, None], axis=1).reshape(-1, k * size)
    values, places = jax.lax.top_k(members, k)
    positions = jnp.take_along_axis(groups, places // size, axis=1) * size + places % size
    return values, positions.astype(jnp.int32)


def _best_of_tile(
    query: Float[Array, "parts q E"],
    tile: Float[Array, "m E"],
    start: Int32[Array, ""],
    stop: Int32[Array, ""],
    excluded: Int32[Array, "q X"] | None,
    query_scope: Int32[Array, " q"] | None,
    tile_scope: Int32[Array, " m"] | None,
    k: int,
) -> tuple[Float32[Array, "q l"], Int32[Array, "q l"]]:
    """Scores and rows of the best of a tile that holds the rows from `start` on, real ones before `stop`."""
    products = [
        jnp.matmul(
            part,
            tile.astype(query.dtype).T,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        for part in query
    ]
    scores = sum(products[1:], start=products[0])
    scores = jnp.where(scores == 0, 0.0, scores)  # -0.0 and 0.0 are equal, but a sort puts one first
    allowed = (jnp.arange(tile.shape[0]) < stop - start)[None, :]
    if query_scope is not None and tile_scope is not None:
        allowed = allowed & (query_scope[:, None] == tile_scope[None, :])
    scores = jnp.where(allowed, scores, -jnp.inf)
    if excluded is not None:
        # A negative column would count from the end, so everything before this tile is sent past its end.
        column = jnp.where(excluded >= start, excluded - start, tile.shape[0])
        scores = scores.at[jnp.arange(scores.shape[0])[:, None], column].set(-jnp.inf, mode="drop")
    top, position = exact_top_k(scores, min(k, tile.shape[0]))
    return top, position + start


@cache
def merging(mesh: Mesh | None, k: int) -> Any:
    """The compiled step that merges the best rows of one tile into the best rows so far."""

    def merge(
        best: Float32[Array, "q k"],
        best_row: Int32[Array, "q k"],
        query: Float[Array, "parts q E"],
        tile: Float[Array, "m E"],
        start: Int32[Array, ""],
        stop: Int32[Array, ""],
        excluded: Int32[Array, "q X"] | None,
        query_scope: Int32[Array, " q"] | None,
        tile_scope: Int32[Array, " m"] | None,
    ) -> tuple[Float32[Array, "q k"], Int32[Array, "q k"]]:
        if mesh is not None:
            start = start + jax.lax.axis_index(AXIS) * tile.shape[0]
        top, row = _best_of_tile(query, tile, start, stop, excluded, query_scope, tile_scope, k)
        if mesh is not None:
            top, row = (jax.lax.all_gather(each, AXIS, axis=1, tiled=True) for each in (top, row))
        # Earlier rows stand first, and top_k prefers the first of equals: ties go to the lower corpus row.
        both, both_row = jnp.concatenate([best, top], axis=1), jnp.concatenate([best_row, row], axis=1)
        merged, order = jax.lax.top_k(both, k)
        return merged, jnp.take_along_axis(both_row, order, axis=1)

    if mesh is None:
        return jax.jit(merge, donate_argnums=(0, 1))
    whole, shared = P(), P(AXIS)
    shares = (whole, whole, whole, shared, whole, whole, whole, whole, shared)
    together = jax.shard_map(merge, mesh=mesh, in_specs=shares, out_specs=(whole, whole), check_vma=False)
    return jax.jit(together, donate_argnums=(0, 1))

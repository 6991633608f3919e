"""Exact search: the k rows of a corpus with the largest inner product, in chunks of one fixed shape.

Memory is bounded by one chunk of the corpus plus the queries, whatever the size of the corpus, which may be a
`np.memmap` or anything else that gives slices. Every chunk has the same padded shape, so a search compiles
one program. On several devices each takes its share of a chunk.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int32

from prime_jax.errors import DataError

_EMPTY = -1
_SHARED = "rows"  # name of the axis of devices


@runtime_checkable
class Rows(Protocol):
    """What is searched: `[M, E]`, in memory, memory-mapped, or read from elsewhere slice by slice."""

    @property
    def shape(self) -> tuple[int, ...]:
        """M and E."""

    @property
    def dtype(self) -> Any:
        """float32 or float16."""

    def __len__(self) -> int:
        """M."""

    def __getitem__(self, wanted: Any) -> Any:
        """Some rows, as a slice or by number."""


def _best_of_chunk(
    query: Float32[Array, "q E"],
    chunk: Float[Array, "m E"],
    start: Int32[Array, ""],
    stop: Int32[Array, ""],
    excluded: Int32[Array, "q X"] | None,
    query_scope: Int32[Array, " q"] | None,
    chunk_scope: Int32[Array, " m"] | None,
    k: int,
) -> tuple[Float32[Array, "q l"], Int32[Array, "q l"]]:
    """Scores and rows of the best of a chunk that holds the rows from `start` on, real ones before `stop`."""
    scores = jnp.matmul(query, chunk.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST)
    allowed = (jnp.arange(chunk.shape[0]) < stop - start)[None, :]
    if query_scope is not None and chunk_scope is not None:
        allowed = allowed & (query_scope[:, None] == chunk_scope[None, :])
    scores = jnp.where(allowed, scores, -jnp.inf)
    if excluded is not None:
        # A negative column would count from the end, so everything before this chunk is sent past its end.
        column = jnp.where(excluded >= start, excluded - start, chunk.shape[0])
        scores = scores.at[jnp.arange(query.shape[0])[:, None], column].set(-jnp.inf, mode="drop")
    top, position = jax.lax.top_k(scores, min(k, chunk.shape[0]))
    return top, position.astype(jnp.int32) + start


@cache
def _merging(mesh: Mesh | None, k: int) -> Any:
    """The compiled step that merges the best rows of one chunk into the best rows so far."""

    def merge(
        best: Float32[Array, "q k"],
        best_row: Int32[Array, "q k"],
        query: Float32[Array, "q E"],
        chunk: Float[Array, "m E"],
        start: Int32[Array, ""],
        stop: Int32[Array, ""],
        excluded: Int32[Array, "q X"] | None,
        query_scope: Int32[Array, " q"] | None,
        chunk_scope: Int32[Array, " m"] | None,
    ) -> tuple[Float32[Array, "q k"], Int32[Array, "q k"]]:
        if mesh is not None:
            start = start + jax.lax.axis_index(_SHARED) * chunk.shape[0]
        top, row = _best_of_chunk(query, chunk, start, stop, excluded, query_scope, chunk_scope, k)
        if mesh is not None:
            top, row = (jax.lax.all_gather(each, _SHARED, axis=1, tiled=True) for each in (top, row))
        # Earlier rows stand first, and top_k prefers the first of equals: ties go to the lower corpus row.
        both, both_row = jnp.concatenate([best, top], axis=1), jnp.concatenate([best_row, row], axis=1)
        merged, order = jax.lax.top_k(both, k)
        return merged, jnp.take_along_axis(both_row, order, axis=1)

    if mesh is None:
        return jax.jit(merge, donate_argnums=(0, 1))
    whole, shared = P(), P(_SHARED)
    shares = (whole, whole, whole, shared, whole, whole, whole, whole, shared)
    together = jax.shard_map(merge, mesh=mesh, in_specs=shares, out_specs=(whole, whole), check_vma=False)
    return jax.jit(together, donate_argnums=(0, 1))


def _chunk_rows(rows: int, limit: int, floor: int = 16) -> int:
    """Rows of a chunk: the limit, or for a small array the next power of two, so that few shapes exist."""
    return min(limit, max(floor, 1 << (max(rows, 1) - 1).bit_length()))


def _pad(values: np.ndarray, rows: int, fill: int = 0) -> np.ndarray:
    if len(values) == rows:
        return values
    return np.concatenate([values, np.full((rows - len(values), *values.shape[1:]), fill, values.dtype)])


def _largest(name: str, values: np.ndarray, first_row: int) -> float:
    """Largest absolute value; refuses NaN and Inf and names the row."""
    largest = max(float(values.max(initial=0.0)), -float(values.min(initial=0.0)))
    if not np.isfinite(largest):
        row = first_row + int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise DataError(f"search: {name} row {row} contains NaN or Inf")
    return largest


def _check(queries: np.ndarray, corpus: Rows, k: int) -> None:
    some: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
        ("queries", queries, ("float32",)),
        ("corpus", corpus, ("float32", "float16")),
    )
    for name, values, dtypes in some:
        if len(values.shape) != 2:
            raise DataError(f"search: {name} must have two axes [rows, E], the shape is {values.shape}")
        if values.dtype not in dtypes:
            raise DataError(f"search: {name} must be {' or '.join(dtypes)}, the dtype is {values.dtype}")
    if queries.shape[1] != corpus.shape[1]:
        raise DataError(f"search: queries have {queries.shape[1]} dimensions, the corpus {corpus.shape[1]}")
    if not 0 < len(corpus) < np.iinfo(np.int32).max:
        raise DataError(
            f"search: the corpus has {len(corpus)} rows; it needs at least one and fewer than 2^31"
        )
    if k < 1:
        raise DataError(f"search: k must be at least 1, it is {k}")


def _excluded_rows(
    exclude: Sequence[np.ndarray] | None, queries: int, corpus: int
) -> list[np.ndarray] | None:
    if exclude is None:
        return None
    if len(exclude) != queries:
        raise DataError(f"search: exclude has {len(exclude)} entries for {queries} queries")
    rows = []
    for number, entry in enumerate(exclude):
        entry = np.asarray(entry)
        if entry.size and (entry.ndim != 1 or entry.dtype.kind not in "iu"):
            raise DataError(f"search: exclude of query {number} must be a 1-D integer array")
        if entry.size and (entry.min() < 0 or entry.max() >= corpus):
            raise DataError(f"search: exclude of query {number} names a row outside 0..{corpus - 1}")
        rows.append(entry.reshape(-1).astype(np.int32))
    return rows if any(len(entry) for entry in rows) else None


def _excluded_parts(excluded: list[np.ndarray] | None, starts: range, rows: int) -> list[np.ndarray | None]:
    """Excluded rows per chunk of queries, `[rows, X]`, -1 where empty; X is one power of two for all."""
    if excluded is None:
        return [None] * len(starts)
    width = _chunk_rows(max(map(len, excluded)), limit=np.iinfo(np.int32).max, floor=4)
    parts: list[np.ndarray | None] = []
    for start in starts:
        table = np.full((rows, width), _EMPTY, np.int32)
        for number, entry in enumerate(excluded[start : start + rows]):
            table[number, : len(entry)] = entry
        parts.append(table)
    return parts


def _scope_codes(
    query_scope: np.ndarray | None,
    corpus_scope: np.ndarray | None,
    queries: int,
    corpus: int,
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Scopes (integers or strings) as int32 codes shared by queries and corpus."""
    if query_scope is None and corpus_scope is None:
        return None, None
    if query_scope is None or corpus_scope is None:
        raise DataError("search: give scopes for both the queries and the corpus, or for neither")
    query_scope, corpus_scope = np.asarray(query_scope), np.asarray(corpus_scope)
    for name, scope, rows in (("query", query_scope, queries), ("corpus", corpus_scope, corpus)):
        if scope.shape != (rows,):
            raise DataError(f"search: {name}_scope must have the shape ({rows},), it has {scope.shape}")
    kinds = {scope.dtype.kind for scope in (query_scope, corpus_scope)}
    if not (kinds <= {"i", "u"} or kinds == {"U"}):
        raise DataError(
            f"search: scopes must be integers or strings, both of one kind; "
            f"they are {query_scope.dtype} and {corpus_scope.dtype}"
        )
    codes = np.unique(np.concatenate([query_scope, corpus_scope]), return_inverse=True)[1].astype(np.int32)
    return codes[:queries], codes[queries:]


def _placing(devices: Sequence[jax.Device] | None) -> tuple[Mesh | None, Any, Any]:
    """The devices that share a search (None for one), where its queries go, and where its passages go."""
    if devices is None:
        devices = jax.local_devices()
        devices = devices[:1] if devices[0].platform == "cpu" else devices
    if len(devices) == 1:
        return None, devices[0], devices[0]
    mesh = Mesh(np.asarray(devices), (_SHARED,))
    return mesh, NamedSharding(mesh, P()), NamedSharding(mesh, P(_SHARED))


def search(
    queries: np.ndarray,
    corpus: Rows,
    k: int,
    *,
    exclude: Sequence[np.ndarray] | None = None,
    query_scope: np.ndarray | None = None,
    corpus_scope: np.ndarray | None = None,
    query_chunk: int = 256,
    corpus_chunk: int = 8192,
    devices: Sequence[jax.Device] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k corpus rows with the largest inner product with each query, exactly.

    Equal scores go to the lower corpus row. Where fewer than k rows remain (a small corpus, exclusions, a
    small scope) the rest has index -1 and score -inf.

    Args:
        queries: `[Q, E]` float32.
        corpus: `[M, E]` float32 or float16; may be a `np.memmap` or another `Rows`, it is read once, chunk by
            chunk, and compared in float32.
        k: How many rows to return; may be larger than M.
        exclude: For each query the corpus rows that must never be returned for it.
        query_scope: `[Q]` integers or strings; with `corpus_scope`, only rows of the same scope are returned.
        corpus_scope: `[M]`, of the same kind as `query_scope`.
        query_chunk: Queries scored at a time.
        corpus_chunk: Corpus rows scored at a time, on each device.
        devices: What shares the work; None takes all of this process, but a single one where they are CPUs.

    Returns:
        Scores float32 `[Q, k]`, descending, and corpus rows int64 `[Q, k]`.

    Raises:
        DataError: On a wrong shape, dtype or k, NaN, Inf, values whose product overflows float32, an excluded
            row that does not exist, or scopes of which one is missing.
    """
    queries = np.asarray(queries)
    corpus = corpus if hasattr(corpus, "dtype") else np.asarray(corpus)
    _check(queries, corpus, k)
    Q, M = len(queries), len(corpus)
    excluded = _excluded_rows(exclude, Q, M)
    query_codes, corpus_codes = _scope_codes(query_scope, corpus_scope, Q, M)
    query_limit = _largest("queries", queries, 0)
    mesh, placed, shared = _placing(devices)
    count = 1 if mesh is None else mesh.size
    q, m = _chunk_rows(Q, query_chunk), count * _chunk_rows(-(-M // count), corpus_chunk)
    merge = _merging(mesh, k)

    starts = range(0, Q, q)
    query_parts = [jax.device_put(_pad(queries[at : at + q], q), placed) for at in starts]
    scope_parts = [
        None if query_codes is None else jax.device_put(_pad(query_codes[at : at + q], q), placed)
        for at in starts
    ]
    excluded_parts = [
        None if part is None else jax.device_put(part, placed)
        for part in _excluded_parts(excluded, starts, q)
    ]
    nothing = np.full((q, k), -np.inf, np.float32), np.full((q, k), _EMPTY, np.int32)
    best = [tuple(jax.device_put(each, placed) for each in nothing) for _ in starts]
    for start in range(0, M, m):
        rows = np.asarray(corpus[start : start + m])
        if _largest("corpus", rows, start) * query_limit * queries.shape[1] > float(np.finfo(np.float32).max):
            raise DataError("search: the values are so large that inner products overflow float32")
        chunk = jax.device_put(_pad(rows, m), shared)
        chunk_scope = None
        if corpus_codes is not None:
            chunk_scope = jax.device_put(_pad(corpus_codes[start : start + m], m), shared)
        stop = np.int32(start + len(rows))
        for part, (query, scope, seen) in enumerate(
            zip(query_parts, scope_parts, excluded_parts, strict=True)
        ):
            best[part] = merge(*best[part], query, chunk, np.int32(start), stop, seen, scope, chunk_scope)
    if not best:
        return np.empty((0, k), np.float32), np.empty((0, k), np.int64)
    scores = np.concatenate([np.asarray(score) for score, _ in best])[:Q]
    found = np.concatenate([np.asarray(row) for _, row in best])[:Q].astype(np.int64)
    return scores, np.where(scores == -np.inf, _EMPTY, found)

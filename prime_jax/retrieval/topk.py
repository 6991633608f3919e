"""Exact search: the k rows of a corpus with the largest inner product, in tiles of one fixed shape.

`search` compares once; an `ExactIndex` is for a corpus that is searched many times. Every tile has the same
padded shape, so a search compiles one program. On several devices each takes its share of a tile.

Where the corpus lies, and what it costs:

- A CPU computes on the corpus where it is, tile by tile, however often it is searched; beside it two tiles
  and the queries are in memory, whatever the size of the corpus, which may be a `np.memmap` or anything else
  that gives slices.
- An accelerator takes the corpus in its own dtype, and an `ExactIndex` keeps it there if that needs at most
  `SHARE` of the memory that is free at the first search. Otherwise, and in `search`, it streams: the next
  tile is copied while the present one is compared, and two are on the device at most.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from prime_jax.errors import DataError
from prime_jax.retrieval.scoring import AXIS, device_magnitude, magnitude, merging, split_queries
from prime_jax.retrieval.search_inputs import (
    EMPTY,
    Rows,
    Scopes,
    check_chunk,
    check_corpus,
    check_queries,
    excluded_rows,
    excluded_tables,
    not_finite,
    pad,
    padded_rows,
)

__all__ = ["ExactIndex", "Rows", "search"]

SHARE = 0.7  # of a device's free memory that a corpus may take


class _Kind(NamedTuple):
    """What suits a kind of device.

    Attributes:
        host: Whether it computes on the host's memory, where the corpus is already.
        halves: Whether float16 products that accumulate in float32 are its fastest.
        queries: Queries compared at a time.
        rows: Corpus rows compared at a time.
    """

    host: bool
    halves: bool
    queries: int
    rows: int


_KINDS = {"cpu": _Kind(True, False, 256, 8192), "gpu": _Kind(False, True, 1024, 65536)}
_OTHER = _Kind(False, False, 1024, 65536)


class _Tile(NamedTuple):
    """Corpus rows `start` to `stop` on the device, with their scopes."""

    start: jax.Array
    stop: jax.Array
    rows: jax.Array
    scope: jax.Array | None


class ExactIndex:
    """A corpus that is searched many times, exactly (see `search`).

    Its values are checked in the first search, on the device. It must not change as long as this is used.

    Args:
        corpus: `[M, E]` float32 or float16; may be a `np.memmap` or another `Rows`.
        corpus_scope: Scopes of its rows, `[M]` integers or strings, or None.
        corpus_chunk: Rows compared at a time, on each device; None means what suits it.
        devices: What shares the work; None takes all of this process, but a single one where they are CPUs.
        keep: Whether an accelerator may keep the corpus.

    Raises:
        DataError: On a wrong shape or dtype of corpus or scopes.
    """

    def __init__(
        self,
        corpus: Rows,
        corpus_scope: np.ndarray | None = None,
        *,
        corpus_chunk: int | None = None,
        devices: Sequence[jax.Device] | None = None,
        keep: bool = True,
    ):
        corpus = corpus if hasattr(corpus, "dtype") else np.asarray(corpus)
        check_corpus(corpus)
        check_chunk("corpus_chunk", corpus_chunk)
        self._corpus: Rows = getattr(
            corpus, "in_stored_dtype", corpus
        )  # what is read from float32 of float16 on disk
        self._scopes = None if corpus_scope is None else Scopes(corpus_scope, len(corpus))
        self._mesh, self._whole, self._shared = _placing(devices)
        self._devices = [self._whole] if self._mesh is None else list(self._mesh.devices.flat)
        self._kind = _KINDS.get(self._devices[0].platform, _OTHER)
        self._tile_rows = padded_rows(-(-len(corpus) // len(self._devices)), corpus_chunk or self._kind.rows)
        self._halves = self._corpus.dtype == np.float16 and self._kind.halves
        self._keep = keep and not self._kind.host
        self._kept: list[_Tile] | None = None
        self._largest: float | None = None  # absolute value of the corpus, once it is known to be finite

    @property
    def resident(self) -> bool:
        """Whether the corpus is on the device."""
        return self._kept is not None

    def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        exclude: Sequence[np.ndarray] | None = None,
        query_scope: np.ndarray | None = None,
        query_chunk: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k corpus rows with the largest inner product with each query; arguments as of `search`.

        Returns:
            Scores float32 `[Q, k]`, descending, and corpus rows int64 `[Q, k]`.

        Raises:
            DataError: As `search`.
        """
        check_chunk("query_chunk", query_chunk)
        queries = np.asarray(queries)
        largest = check_queries(queries, self._corpus, k)
        Q, M = len(queries), len(self._corpus)
        excluded = excluded_rows(exclude, Q, M)
        if (query_scope is None) != (self._scopes is None):
            raise DataError("search: give scopes for both the queries and the corpus, or for neither")
        codes = None
        if self._scopes is not None and query_scope is not None:
            codes = self._scopes.of_queries(query_scope, Q)
        q = padded_rows(Q, query_chunk or self._kind.queries)
        starts = range(0, Q, q)
        tables = excluded_tables(excluded, starts, q)
        asked = [self._placed(queries[at : at + q], q) for at in starts]
        scopes = [None if codes is None else self._put(pad(codes[at : at + q], q)) for at in starts]
        hidden = [None if table is None else self._put(table) for table in tables]
        nothing = np.full((q, k), -np.inf, np.float32), np.full((q, k), EMPTY, np.int32)
        best = [tuple(self._put(each) for each in nothing) for _ in starts]
        merge = merging(self._mesh, k)
        streamed = not self.resident
        for tile in self._tiles(largest):
            if streamed:  # this tile's copy runs; the one before goes before a third comes
                jax.block_until_ready(best)
            for part, (query, _) in enumerate(asked):
                best[part] = merge(
                    *best[part],
                    query,
                    tile.rows,
                    tile.start,
                    tile.stop,
                    hidden[part],
                    scopes[part],
                    tile.scope,
                )
        if not best:
            return np.empty((0, k), np.float32), np.empty((0, k), np.int64)
        scores = np.concatenate(
            [
                np.ldexp(np.asarray(score), exponent)
                for (score, _), (_, exponent) in zip(best, asked, strict=True)
            ]
        )[:Q]
        found = np.concatenate([np.asarray(row) for _, row in best])[:Q].astype(np.int64)
        return scores, np.where(scores == -np.inf, EMPTY, found)

    def _placed(self, queries: np.ndarray, rows: int) -> tuple[jax.Array, Any]:
        """Queries `[parts, rows, E]` on the device, and the exponents that their scores lack."""
        padded = pad(queries, rows)
        if not self._halves:
            return self._put(padded[None]), np.int32(0)
        parts, exponent = split_queries(padded)
        return self._put(parts), exponent[:, None]

    def _put(self, values: np.ndarray) -> jax.Array:
        placed: jax.Array = jax.device_put(values, self._whole)
        return placed

    def _tiles(self, largest_query: float) -> Iterator[_Tile]:
        """The corpus on the device, tile by tile, each checked before the one after the next is asked for.

        Raises:
            DataError: If values are NaN or Inf, or products with the queries would overflow.
        """
        if self._largest is not None:
            self._check_overflow(self._largest, largest_query)
        if self._kept is not None:
            yield from self._kept
            return
        keep = self._keep and self._fits()
        kept: list[_Tile] = []
        seen = 0.0
        unchecked: tuple[int, Any] | None = None
        m = self._tile_rows * len(self._devices)
        for start in range(0, len(self._corpus), m):
            rows = np.asarray(self._corpus[start : start + m])
            if self._kind.host and self._largest is None:
                seen = max(seen, self._check(start, magnitude(rows), largest_query))
            scope = None
            if self._scopes is not None:
                scope = jax.device_put(pad(self._scopes.codes[start : start + m], m), self._shared)
            first, end = (self._put(np.asarray(row, np.int32)) for row in (start, start + len(rows)))
            tile = _Tile(first, end, jax.device_put(pad(rows, m), self._shared), scope)
            if unchecked is not None:
                seen = max(seen, self._check(*unchecked, largest_query))
            if not self._kind.host and self._largest is None:
                unchecked = start, device_magnitude(tile.rows)
            if keep:
                kept.append(tile)
            yield tile
        if unchecked is not None:
            seen = max(seen, self._check(*unchecked, largest_query))
        if self._largest is None:
            self._largest = seen
        if keep:
            self._kept = kept

    def _check(self, start: int, bits: Any, largest_query: float) -> float:
        """The largest absolute value of a tile, of which the `magnitude` is given."""
        dtype = np.dtype(self._corpus.dtype)
        largest = float(np.asarray(bits).view(dtype))
        if not np.isfinite(largest):
            end = start + self._tile_rows * len(self._devices)
            raise not_finite("corpus", np.asarray(self._corpus[start:end]), start)
        self._check_overflow(largest, largest_query)
        return largest

    def _check_overflow(self, largest: float, largest_query: float) -> None:
        if largest * largest_query * self._corpus.shape[1] > float(np.finfo(np.float32).max):
            raise DataError("search: the values are so large that inner products overflow float32")

    def _fits(self) -> bool:
        """Whether each device has room for its share of the corpus."""
        tiles = -(-len(self._corpus) // (self._tile_rows * len(self._devices)))
        row_bytes = self._corpus.shape[1] * np.dtype(self._corpus.dtype).itemsize + 4 * bool(self._scopes)
        working = 3 * 4 * self._kind.queries * self._tile_rows  # scores of both halves, and their sum
        need = tiles * self._tile_rows * row_bytes
        return all(need <= SHARE * (free_memory(device) - working) for device in self._devices)


def free_memory(device: jax.Device) -> int:
    """Bytes that a device can still give; 0 where it does not say."""
    stats = device.memory_stats() or {}
    return int(stats.get("bytes_limit", 0)) - int(stats.get("bytes_in_use", 0))


def _placing(devices: Sequence[jax.Device] | None) -> tuple[Mesh | None, Any, Any]:
    """The devices that share a search (None for one), where its queries go, and where its passages go."""
    if devices is None:
        devices = jax.local_devices()
        devices = devices[:1] if devices[0].platform == "cpu" else devices
    if len(devices) == 1:
        return None, devices[0], devices[0]
    mesh = Mesh(np.asarray(devices), (AXIS,))
    return mesh, NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))


def search(
    queries: np.ndarray,
    corpus: Rows,
    k: int,
    *,
    exclude: Sequence[np.ndarray] | None = None,
    query_scope: np.ndarray | None = None,
    corpus_scope: np.ndarray | None = None,
    query_chunk: int | None = None,
    corpus_chunk: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k corpus rows with the largest inner product with each query, exactly.

    Equal scores go to the lower corpus row. Where fewer than k rows remain (a small corpus, exclusions, a
    small scope) the rest has index -1 and score -inf.

    Args:
        queries: `[Q, E]` float32.
        corpus: `[M, E]` float32 or float16; may be a `np.memmap` or another `Rows`, it is read once, tile by
            tile, and compared in float32 (on a GPU a float16 one as `scoring.split_queries` says).
        k: How many rows to return; may be larger than M.
        exclude: For each query the corpus rows that must never be returned for it.
        query_scope: `[Q]` integers or strings; with `corpus_scope`, only rows of the same scope are returned.
        corpus_scope: `[M]`, of the same kind as `query_scope`.
        query_chunk: Queries compared at a time; None means what suits the device.
        corpus_chunk: Corpus rows compared at a time, on each device; None means what suits it.
        devices: What shares the work; None takes all of this process, but a single one where they are CPUs.

    Returns:
        Scores float32 `[Q, k]`, descending, and corpus rows int64 `[Q, k]`.

    Raises:
        DataError: On a wrong shape, dtype or k, NaN, Inf, values whose product overflows float32, an excluded
            row that does not exist, or scopes of which one is missing.
    """
    index = ExactIndex(corpus, corpus_scope, corpus_chunk=corpus_chunk, devices=devices, keep=False)
    return index.search(queries, k, exclude=exclude, query_scope=query_scope, query_chunk=query_chunk)

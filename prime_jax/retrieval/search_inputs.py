"""What a search is given, checked and brought into the form that its compiled steps take."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from prime_jax.errors import DataError

EMPTY = -1  # in place of a row


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


def padded_rows(rows: int, limit: int, floor: int = 16) -> int:
    """Rows of a chunk: the limit, or for a small array the next power of two, so that few shapes exist."""
    return min(limit, max(floor, 1 << (max(rows, 1) - 1).bit_length()))


def pad(values: np.ndarray, rows: int, fill: int = 0) -> np.ndarray:
    """The values with rows of `fill` behind them."""
    if len(values) == rows:
        return values
    return np.concatenate([values, np.full((rows - len(values), *values.shape[1:]), fill, values.dtype)])


def check_queries(queries: np.ndarray, corpus: Rows, k: int) -> float:
    """The largest absolute value of the queries.

    Raises:
        DataError: On a wrong shape, dtype or k, NaN or Inf.
    """
    _check_array("queries", queries, ("float32",))
    if queries.shape[1] != corpus.shape[1]:
        raise DataError(f"search: queries have {queries.shape[1]} dimensions, the corpus {corpus.shape[1]}")
    if k < 1:
        raise DataError(f"search: k must be at least 1, it is {k}")
    largest = max(float(queries.max(initial=0.0)), -float(queries.min(initial=0.0)))
    if not np.isfinite(largest):
        raise not_finite("queries", queries, 0)
    return largest


def check_corpus(corpus: Rows) -> None:
    """Refuse a corpus of a wrong shape or dtype; its values are not read.

    Raises:
        DataError: The message says what it has and what it needs.
    """
    _check_array("corpus", corpus, ("float32", "float16"))
    if not 0 < len(corpus) < np.iinfo(np.int32).max:
        raise DataError(
            f"search: the corpus has {len(corpus)} rows; it needs at least one and fewer than 2^31"
        )


def not_finite(name: str, values: np.ndarray, first_row: int) -> DataError:
    """The error for values of which some are NaN or Inf; it names the first such row."""
    row = first_row + int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
    return DataError(f"search: {name} row {row} contains NaN or Inf")


def _check_array(name: str, values: Any, dtypes: tuple[str, ...]) -> None:
    if len(values.shape) != 2:
        raise DataError(f"search: {name} must have two axes [rows, E], the shape is {values.shape}")
    if values.dtype not in dtypes:
        raise DataError(f"search: {name} must be {' or '.join(dtypes)}, the dtype is {values.dtype}")


def excluded_rows(exclude: Sequence[np.ndarray] | None, queries: int, corpus: int) -> list[np.ndarray] | None:
    """Row numbers as int32 arrays, one for each query; None where nothing is excluded."""
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


def excluded_tables(excluded: list[np.ndarray] | None, starts: range, rows: int) -> list[np.ndarray | None]:
    """Excluded rows per chunk of queries, `[rows, X]`, -1 where empty; X is one power of two for all."""
    if excluded is None:
        return [None] * len(starts)
    width = padded_rows(max(map(len, excluded)), limit=np.iinfo(np.int32).max, floor=4)
    parts: list[np.ndarray | None] = []
    for start in starts:
        table = np.full((rows, width), EMPTY, np.int32)
        for number, entry in enumerate(excluded[start : start + rows]):
            table[number, : len(entry)] = entry
        parts.append(table)
    return parts


def check_chunk(name: str, rows: int | None) -> None:
    """Refuse a chunk without rows.

    Raises:
        DataError: If it has fewer than one; None means that the search chooses.
    """
    if rows is not None and rows < 1:
        raise DataError(f"search: {name} is {rows}, it must be 1 or more")


class Scopes:
    """Scopes of a corpus, integers or strings, as int32 codes.

    Attributes:
        codes: Of the corpus rows, `[M]`, from 0.

    Raises:
        DataError: If there is not one scope for each of the `rows`, or they are of another kind.
    """

    def __init__(self, corpus_scope: np.ndarray, rows: int):
        scope = _scope_array("corpus", corpus_scope, rows)
        self._values, codes = np.unique(scope, return_inverse=True)
        self.codes = codes.astype(np.int32)

    def of_queries(self, query_scope: np.ndarray, queries: int) -> np.ndarray:
        """Codes of the queries' scopes, int32 `[Q]`; -1 for one that no corpus row has.

        Raises:
            DataError: If there is not one for each query, or they are of another kind than the corpus' are.
        """
        scope = _scope_array("query", query_scope, queries)
        if (scope.dtype.kind == "U") != (self._values.dtype.kind == "U"):
            raise DataError(
                f"search: scopes must be integers or strings, both of one kind; "
                f"they are {scope.dtype} and {self._values.dtype}"
            )
        known = np.ones(queries, bool)
        if scope.dtype.kind != self._values.dtype.kind:  # numpy would compare int64 and uint64 as float64
            limits = np.iinfo(self._values.dtype)
            known = np.array([limits.min <= int(one) <= limits.max for one in scope], bool)
            scope = np.where(known, scope, 0).astype(self._values.dtype)
        place = np.minimum(np.searchsorted(self._values, scope), len(self._values) - 1)
        return np.where(known & (self._values[place] == scope), place, EMPTY).astype(np.int32)


def _scope_array(name: str, scope: np.ndarray, rows: int) -> np.ndarray:
    scope = np.asarray(scope)
    if scope.shape != (rows,):
        raise DataError(f"search: {name}_scope must have the shape ({rows},), it has {scope.shape}")
    if scope.dtype.kind not in "iuU":
        raise DataError(f"search: scopes must be integers or strings; {name}_scope is {scope.dtype}")
    return scope

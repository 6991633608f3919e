"""Context from a first search, for data whose examples have none by nature (multi-hop questions).

A first dense search with the query finds k passages; they stand in for the turns of a conversation.
"""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from prime_jax import files
from prime_jax.data.store import EmbeddingStore
from prime_jax.errors import DataError
from prime_jax.retrieval.topk import search

FOLDER = "first-pass"


def first_pass(
    store: EmbeddingStore,
    query_rows: Int[np.ndarray, " n"],
    corpus_rows: Int[np.ndarray, " M"],
    k: int,
    *,
    exclude: Sequence[Int[np.ndarray, " _"]],
    query_scope: Int[np.ndarray, " n"],
    corpus_scope: Int[np.ndarray, " M"],
) -> Int[np.ndarray, "n k"]:
    """The k passages nearest to each query, the best one LAST, so that it stands next to the query.

    The result is kept in the store's folder under a hash of the store's content and all arguments.

    Args:
        store: Holds the embeddings.
        query_rows: Store rows of the queries, `[n]`.
        corpus_rows: Store rows of the passages, `[M]`.
        k: Passages per query.
        exclude: Per query, the indices into `corpus_rows` that must not be found.
        query_scope: Scope of each query, `[n]`; only passages of the same scope are found.
        corpus_scope: Scope of each passage, `[M]`.

    Returns:
        Indices into `corpus_rows`, `[n, k]` int64. Where fewer than k passages may be found, the row begins
        with them and ends with -1.

    Raises:
        DataError: If the kept result is damaged.
    """
    digest = hashlib.sha256(f"{store.hash} {k}".encode())
    lengths = np.array([len(rows) for rows in exclude], np.int64)
    for array in (query_rows, corpus_rows, query_scope, corpus_scope, lengths, *exclude):
        digest.update(len(array).to_bytes(8, "little") + array.astype("<i8").tobytes())
    path = store.folder / FOLDER / f"{digest.hexdigest()[:32]}.safetensors"
    found = _read(path, (len(query_rows), k), len(corpus_rows)) if path.exists() else None
    if found is None:
        _, found = search(
            store[query_rows],
            store.part(corpus_rows),
            k,
            exclude=exclude,
            query_scope=query_scope,
            corpus_scope=corpus_scope,
        )
        with suppress(OSError), files.atomic_path(path) as temporary:  # a folder that is only read
            save_file({"found": found}, temporary, {"sha256": _sha256(found)})
    return _best_last(found)


def _read(path: Path, shape: tuple[int, int], passages: int) -> Int[np.ndarray, "n k"] | None:
    """A kept result; None for one of an earlier version, which nothing vouches for."""
    try:
        with safe_open(path, "numpy") as kept:
            found: np.ndarray = kept.get_tensor("found")
            vouched = (kept.metadata() or {}).get("sha256")
    except (SafetensorError, KeyError):
        raise DataError(f"{path}: damaged; delete it and it will be made again") from None
    if vouched is None:
        return None
    if vouched != _sha256(found):
        raise DataError(f"{path}: damaged or changed; delete it and it will be made again")
    if found.shape != shape or found.dtype != np.int64 or found.min() < -1 or found.max() >= passages:
        raise DataError(f"{path}: not the first search of this data; delete it and it will be made again")
    return found


def _sha256(found: Int[np.ndarray, "n k"]) -> str:
    return hashlib.sha256(np.ascontiguousarray(found).tobytes()).hexdigest()


def _best_last(found: Int[np.ndarray, "n k"]) -> Int[np.ndarray, "n k"]:
    """Reverse each row without moving the -1 at its end."""
    counts = (found >= 0).sum(axis=1, keepdims=True)
    places = counts - 1 - np.arange(found.shape[1])
    return np.where(places >= 0, np.take_along_axis(found, np.maximum(places, 0), axis=1), -1)

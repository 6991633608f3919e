"""An embedding store with more rows behind its own, such as the steering vectors of a dataset."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from prime_jax.data.store import DType, EmbeddingStore
from prime_jax.errors import DataError
from prime_jax.retrieval.topk import Rows


class SteeringVectors:
    """The vectors of all splits one after the other as rows `[R, D]`, never loaded as a whole."""

    dtype = np.dtype(np.float32)

    def __init__(self, paths: Sequence[Path]):
        """Map files of `[pairs, variants, D]`.

        Raises:
            DataError: If one cannot be mapped.
        """
        self._paths = tuple(paths)
        parts = [mapped(path) for path in self._paths]
        self._parts = [part.reshape(-1, part.shape[-1]) for part in parts]
        self._starts = np.cumsum([0, *map(len, self._parts)])
        self.shape = (int(self._starts[-1]), self._parts[0].shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Int[np.ndarray, " n"]) -> Float32[np.ndarray, "n D"]:
        gathered = np.empty((len(rows), self.shape[1]), np.float32)
        part_of = np.searchsorted(self._starts, rows, side="right") - 1
        for part in np.unique(part_of):
            here = part_of == part
            gathered[here] = self._parts[part][rows[here] - self._starts[part]]
        return gathered

    def __reduce__(self) -> tuple[Any, ...]:
        return SteeringVectors, (self._paths,)


class Extended(EmbeddingStore):
    """A store with more rows behind its own; the store itself is not changed.

    Rows below `first` are those of the store, the next R are `extra`. What the store takes in later has the
    numbers after these, so that no row ever moves.

    Args:
        store: The store.
        extra: `[R, D]`, such as a memory map.

    Attributes:
        first: Number of the first extra row.
        extra: As given.

    Raises:
        DataError: If `extra` is not `[R, D]` with the D of the store.
    """

    def __init__(self, store: EmbeddingStore, extra: Rows):
        if len(extra.shape) != 2 or extra.shape[1] != store.dim:
            raise DataError(
                f"{store.folder}: rows of {store.dim} dimensions, not {extra.shape}, fit behind it"
            )
        self.folder, self.first, self.extra = store.folder, len(store), extra
        self._store = store

    @property
    def identity(self) -> str:
        """Of the store."""
        return self._store.identity

    @property
    def dim(self) -> int:
        """Of the store."""
        return self._store.dim

    @property
    def dtype(self) -> DType:
        """Of the store; extra rows have their own."""
        return self._store.dtype

    @property
    def hash(self) -> str:
        """Of the store, without the extra rows."""
        return self._store.hash

    def __len__(self) -> int:
        return len(self._store) + len(self.extra)

    def __contains__(self, text: str) -> bool:
        return text in self._store

    def __reduce__(self) -> tuple[Any, ...]:
        return Extended, (self._store, self.extra)

    def missing(self, texts: Sequence[str]) -> list[str]:
        """As the store."""
        return self._store.missing(texts)

    def rows(self, texts: Sequence[str]) -> Int[np.ndarray, " n"]:
        """As the store, in the numbers of this view."""
        found = self._store.rows(texts)
        return np.where(found < self.first, found, found + len(self.extra))

    def dtype_of(self, rows: Int[np.ndarray, " M"]) -> DType:
        """As the store; float32 where some rows are extra ones."""
        extra = (rows >= self.first) & (rows < self.first + len(self.extra))
        return "float32" if extra.any() else self._store.dtype

    def __getitem__(self, rows: Any) -> Any:
        return self.gather(rows, np.dtype(np.float32))

    def gather(self, rows: Any, dtype: np.dtype[Any]) -> Any:
        """As the store."""
        wanted = np.asarray(rows)
        flat = wanted.reshape(-1)
        if wanted.dtype.kind not in "iu" or (flat.size and not 0 <= flat.min() <= flat.max() < len(self)):
            raise DataError(f"{self.folder}: no such rows among 0 to {len(self) - 1}: {wanted}")
        place = flat.astype(np.int64) - self.first
        mine = (place >= 0) & (place < len(self.extra))
        gathered = np.empty((len(flat), self.dim), dtype)
        gathered[mine] = self.extra[place[mine]]
        own = place[~mine]
        below = self.first + np.where(own < 0, own, own - len(self.extra))
        gathered[~mine] = self._store.gather(below, dtype)
        return gathered.reshape(*wanted.shape, self.dim)

    def add(self, texts: Sequence[str], embeddings: Any) -> None:
        """As the store."""
        self._store.add(texts, embeddings)

    def verify(self, *, again: bool = True) -> None:
        """As the store."""
        self._store.verify(again=again)


def mapped(path: Path) -> np.ndarray:
    """A .npy file as a memory map.

    Raises:
        DataError: If it is missing or is none.
    """
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as wrong:
        raise DataError(f"{path}: cannot be read ({wrong}); make it again") from None
    return array

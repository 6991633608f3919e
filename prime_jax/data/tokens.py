"""Texts as token ids, tokenised once: what encoders read that are trained along with a predictor."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Int64

from prime_jax.data.store import EmbeddingStore
from prime_jax.types import Texts

BUCKETS = (16, 32, 64, 128, 256, 512)
"""Lengths that batches are padded to: for each one that occurs, a step is compiled."""


class TokenTable:
    """Token ids of texts by their row in the store.

    Args:
        store: Knows the rows.
        texts: Every text that batches may name, as the store keys it.
        tokenize: Gives the ids of each text.
    """

    def __init__(
        self, store: EmbeddingStore, texts: Sequence[str], tokenize: Callable[[Sequence[str]], list[Any]]
    ):
        rows, ids = store.rows(texts), tokenize(texts)
        lengths = np.array([len(each) for each in ids], np.int64)
        self._flat = np.concatenate([*ids, np.zeros(1, np.int32)]).astype(np.int32)
        size = int(rows.max()) + 1
        self._start, self._length = np.zeros(size + 1, np.int64), np.zeros(size + 1, np.int32)
        self._start[rows] = np.cumsum(lengths) - lengths
        self._length[rows] = lengths  # the last entry, which row -1 finds, is an empty text

    def width(self, *rows: Int64[np.ndarray, "..."]) -> int:
        """The bucket that the longest of these texts needs."""
        longest = max(int(self._length[each].max(initial=0)) for each in rows)
        return next(bucket for bucket in (*BUCKETS, longest) if bucket >= longest)

    def padded(self, rows: Int64[np.ndarray, "*a"], width: int) -> Texts:
        """Token ids `[*a, width]` and lengths `[*a]` of the texts in these rows; -1 is an empty text."""
        lengths: Int[np.ndarray, ...] = self._length[rows]
        places = np.arange(width)
        real = places < lengths[..., None]
        found = self._flat[np.where(real, self._start[rows][..., None] + places, 0)]
        padded: Any = np.where(real, found, 0).astype(np.int32), lengths
        return Texts(*padded)

"""Choosing among many ways to search with the largest MRR@10 on a split."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from prime_jax.retrieval.metrics import mean_reciprocal_rank

T = TypeVar("T")
_ROWS_PER_SEARCH = 65_536  # query vectors searched at once; bounds memory to about 100 MB at E = 384


def best_setting(
    settings: Sequence[T],
    vectors_of: Callable[[T], Float32[ndarray, "Q E"]],
    search: Callable[[Float32[ndarray, "C E"], int], Int64[ndarray, "C k"]],
    positives: Sequence[ndarray],
) -> tuple[T, float]:
    """The setting with the largest MRR@10, the first of equally good ones, and that MRR@10.

    Args:
        settings: The simplest first.
        vectors_of: Gives what a setting searches with for each query of the split.
        search: `search(vectors, copies)` gives the rows found for all queries of the split, so many times
            one behind the other.
        positives: Right rows of each query of the split.
    """
    at_once = max(1, _ROWS_PER_SEARCH // max(1, len(positives)))
    scores: list[float] = []
    for start in range(0, len(settings), at_once):
        some = settings[start : start + at_once]
        found = search(np.concatenate([vectors_of(one) for one in some]), len(some))
        scores += mean_reciprocal_rank(found.reshape(len(some), -1, found.shape[1]), positives).tolist()
    best = int(np.argmax(np.round(scores, 12)))
    return settings[best], scores[best]

"""Which queries ask for something that training has already given as an answer."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool
from numpy import ndarray


def unseen(positives: Sequence[ndarray], trained: Sequence[ndarray]) -> Bool[ndarray, " Q"]:
    """Queries none of whose right answers is one of a training example.

    Args:
        positives: Right corpus rows of each query.
        trained: Those of each training example.
    """
    known = np.unique(np.concatenate([*trained, np.empty(0, np.int64)]))
    return np.array([not np.isin(right, known).any() for right in positives], bool)

"""Which queries depend on each other."""

from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from jaxtyping import Int64
from numpy import ndarray
from scipy import sparse


def linked(items: Sequence[Iterable[Hashable]]) -> Int64[ndarray, " Q"]:
    """Group labels for queries that share an item, directly or through others (connected components).

    With the texts of its turns as items, this finds the queries of one conversation or document without being
    told; a phrase common to two conversations joins them, which errs on the careful side.
    """
    number: dict[Hashable, int] = {}
    pairs = [(row, number.setdefault(item, len(number))) for row, some in enumerate(items) for item in some]
    rows, columns = np.array(pairs, np.int64).reshape(-1, 2).T
    size = len(items) + len(number)
    graph = sparse.coo_array((np.ones(len(pairs)), (rows, columns + len(items))), shape=(size, size))
    labels = sparse.csgraph.connected_components(graph, directed=False)[1][: len(items)]
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)

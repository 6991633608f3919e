"""Which examples belong to one conversation and so depend on each other; parts of whole conversations."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int64

from prime_jax.data.records import Example
from prime_jax.errors import DataError
from prime_jax.retrieval.groups import linked

CONVERSATION = "conversation"
"""The key of a record that says which conversation it is of, where the data has it."""


def conversation_labels(examples: Sequence[Example]) -> Int64[np.ndarray, " n"]:
    """One label per example, from 0.

    Where every example says which conversation it is of, that counts. Otherwise those that share a text, as
    turn or as query, belong together.

    Raises:
        DataError: If a record says it with something else than a text.
    """
    names = [one.extra.get(CONVERSATION) for one in examples]
    for example, name in zip(examples, names, strict=True):
        if CONVERSATION in example.extra and not (isinstance(name, str) and name):
            raise DataError(f"record {example.id!r}: its {CONVERSATION!r} is {name!r}, not a text")
    if names and None not in names:
        return np.unique(np.array(names), return_inverse=True)[1].astype(np.int64)
    return linked([(*one.context, one.query) for one in examples])


def some_conversations(examples: Sequence[Example], size: int, *, seed: int = 0) -> Bool[np.ndarray, " n"]:
    """Which examples a part of about `size` of them has: whole conversations, in an order that `seed` gives.

    A smaller part lies in every larger one.
    """
    labels = conversation_labels(examples)
    place = np.random.default_rng(seed).permutation(int(labels.max()) + 1)[labels]
    counts = np.bincount(place).cumsum()
    part: Bool[np.ndarray, " n"] = place <= int(np.argmin(np.abs(counts - size)))
    return part

"""The query drawn towards the turns before it: the best thing to search with that nobody has to train."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int64
from numpy import ndarray

from prime_jax.retrieval.vectors import unit


class RecencyMix(NamedTuple):
    """`query + weight * sum of decay^age * turn`, where the last turn has age 0.

    Attributes:
        weight: Of the last turn; 0 is the plain query.
        decay: By how much a turn counts less than the one after it, 0 to 1.
    """

    weight: float
    decay: float

    def __str__(self) -> str:
        if self.weight == 0:
            return "the query"
        return f"the query + {self.weight:g} * the turns (decay {self.decay:g})"

    def __call__(
        self,
        context: Float32[ndarray, "Q N D"],
        mask: Bool[ndarray, "Q N"],
        query: Float32[ndarray, "Q D"],
    ) -> Float32[ndarray, "Q D"]:
        """The vectors to search with, unit norm.

        Args:
            context: Turns, oldest first; padded slots may hold anything.
            mask: True where a turn is real.
            query: The queries, of any length.
        """
        return mixing(context, mask, query)(self)


PLAIN_QUERY = RecencyMix(0.0, 0.0)
_WEIGHTS = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0, 1.5, 2.5)
_DECAYS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
MIXES = (
    PLAIN_QUERY,
    *(RecencyMix(weight, decay) for decay, weight in itertools.product(_DECAYS, _WEIGHTS)),
)
"""What is tried where a mix is tuned, the simplest first."""


def mixing(
    context: Float32[ndarray, "Q N D"], mask: Bool[ndarray, "Q N"], query: Float32[ndarray, "Q D"]
) -> Callable[[RecencyMix], Float32[ndarray, "Q D"]]:
    """What any mix makes of the same requests (`RecencyMix`); what all mixes share is computed once."""
    base, turns, age = unit(query), real_turns(context, mask), ages(mask).astype(np.float32)

    def mixed(mix: RecencyMix) -> Float32[ndarray, "Q D"]:
        weights = np.float32(mix.weight) * np.float32(mix.decay) ** age
        return unit(base + np.einsum("qn,qnd->qd", weights, turns))

    return mixed


def real_turns(context: Float32[ndarray, "Q N D"], mask: Bool[ndarray, "Q N"]) -> Float32[ndarray, "Q N D"]:
    """Unit-norm turns, zero where there is none."""
    return unit(np.where(mask[..., None], context, 0))


def ages(mask: Bool[ndarray, "Q N"]) -> Int64[ndarray, "Q N"]:
    """How many real turns came after each turn: 0 for the last one, wherever the padding stands."""
    age: Int64[ndarray, "Q N"] = np.cumsum(mask[:, ::-1], axis=1)[:, ::-1] - mask
    return age

"""Weights between those that a run started from and those that it trained (WiSE-FT, arXiv 2109.01903).

A pretrained encoder that is trained on few examples can end worse than it was. Part of the way is often
better than all of it, and none of it is where it started: chosen on dev, training does no harm there.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from prime_jax.train.state import TrainState

SHARES = (1.0, 0.75, 0.5)
"""How much of the way from start to trained is tried, besides none; the first of equally good ones wins."""


SHARE = "blend_share"  # in the history and in a checkpoint's manifest


def words_of(facts: Mapping[str, float]) -> str:
    """Where a validated state lies, for the line of progress; nothing where no weights are blended."""
    return f" at {facts[SHARE]:g} of the way from the start" if SHARE in facts else ""


class Blending:
    """Chooses how far from its start a run's weights are to predict.

    Args:
        start: State before the first step.
    """

    def __init__(self, start: TrainState):
        self._start = jax.tree.map(jnp.copy, start.predicting)
        self._score_of_start: float | None = None

    def at(self, state: TrainState, share: float) -> TrainState:
        """The state as it predicts at that share of the way; 1 is as it was trained."""
        return replace(state, smoothed=_between(self._start, state.predicting, jnp.float32(share)))

    def best(self, state: TrainState, score: Callable[[TrainState], float]) -> tuple[TrainState, float]:
        """The state that predicts best, and its share of the way.

        Args:
            state: As it was trained.
            score: Gives the figure to be large; every process must get the same from it.
        """
        if self._score_of_start is None:
            self._score_of_start = score(self.at(state, 0.0))
        scores = {share: score(self.at(state, share)) for share in SHARES} | {0.0: self._score_of_start}
        share = max(scores, key=lambda share: scores[share])
        return self.at(state, share), share


@jax.jit
def _between(start: Any, trained: Any, share: Array) -> Any:
    return jax.tree.map(lambda before, now: (1 - share) * before + share * now, start, trained)

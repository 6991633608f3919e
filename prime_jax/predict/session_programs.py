"""What sessions run on the device: one compiled program for each number of new turns."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.models.prime import PredictorConfig
from prime_jax.predict.compiled import compile_ahead
from prime_jax.predict.forward import Cache, advance, empty_cache
from prime_jax.predict.precision import Recipe
from prime_jax.predict.weights import Weights
from prime_jax.progress import progress

FEW_TURNS = (0, 1, 2)
"""How many new turns have a program of their own; more are computed with the whole window."""

Program = Callable[..., Any]


def new_turn_counts(config: PredictorConfig) -> tuple[int, ...]:
    """For how many new turns at a time a session's programs are compiled.

    With prefix attention a new turn changes what all others see, so their keys and values are computed anew.
    """
    most = config.max_context_length
    if config.context_attention == "prefix":
        return (0, most)
    return (*(count for count in FEW_TURNS if count < most), most)


class SessionPrograms:
    """The compiled programs of sessions of one batch size, and the weights they read.

    Attributes:
        config: The model's configuration.
        batch: How many conversations advance together.
    """

    def __init__(self, config: PredictorConfig, weights: Weights, recipe: Recipe, batch: int):
        self.config = config
        self._weights = weights
        self.batch = batch
        self._advance: dict[int, Program] = {}
        counts = new_turn_counts(config)
        with progress("Compiling the session", len(counts), "programs") as step:
            for new in counts:
                self._advance[new] = compile_ahead(
                    partial(advance, config=config, attention=recipe.attention),
                    weights,
                    jax.eval_shape(self.empty),
                    jax.ShapeDtypeStruct((batch, new, config.input_dim), jnp.float32),
                    jax.ShapeDtypeStruct((batch,), jnp.int32),
                    jax.ShapeDtypeStruct((batch,), jnp.int32),
                    jax.ShapeDtypeStruct((batch, config.input_dim), jnp.float32),
                    mode=config.compile_mode,
                    donate=(1,),
                )
                step(1)

    def empty(self) -> Cache:
        """A cache without turns."""
        return empty_cache(self.config, self.batch)

    def advance(
        self, cache: Cache, turns: np.ndarray, start: np.ndarray, count: np.ndarray, query: np.ndarray
    ) -> tuple[jax.Array, Cache]:
        """Add turns to the conversations and predict (`forward.advance`); `cache` is used up."""
        answer, cache = self._advance[turns.shape[1]](self._weights, cache, turns, start, count, query)
        return answer, cache

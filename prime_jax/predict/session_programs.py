"""What sessions run on the device: one compiled program for each number of new turns."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.models.mix import MixConfig
from prime_jax.models.prime import PredictorConfig
from prime_jax.predict.compiled import compile_ahead, compile_all, trace_ahead
from prime_jax.predict.forward import Cache, advance, empty_cache
from prime_jax.predict.packing import Flat, valid_input, with_state
from prime_jax.predict.precision import Recipe
from prime_jax.predict.programs import Program as BatchProgram
from prime_jax.predict.staging import Buffers, Staging
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

    New turns, query and two counts go to the device as one array; what comes back is the answer with its
    state (`packing.with_state`).

    Attributes:
        config: The model's configuration.
        batch: How many conversations advance together.
        turn_counts: For how many new turns at a time there is a program, ascending.
    """

    def __init__(self, config: PredictorConfig, weights: Flat, recipe: Recipe, batch: int):
        self.config = config
        self._weights = weights.arguments
        self.batch = batch
        self._advance: dict[int, Program] = {}
        staging = Staging(weights.device)
        cache = jax.eval_shape(partial(empty_cache, config, batch))

        def traced(new: int) -> Callable[[], None]:
            compiled = trace_ahead(
                _advance_packed(config, weights, recipe, new, staging),
                cache,
                staging.shape(self._packed(new)),
                *weights.arguments,
                mode=config.compile_mode,
                donate=(0,),
                answers=(staging.answers, staging.kept),
                rows=batch * (new + 2),
            )
            return lambda: self._advance.update({new: compiled()})

        counts = self.turn_counts = new_turn_counts(config)
        self._buffers = {new: Buffers(staging, self._packed(new)) for new in counts}
        with progress("Compiling the session", len(counts) + 1, "programs") as step:
            self._empty = compile_ahead(partial(empty_cache, config, batch), mode="default")
            step(1)
            compile_all((traced(new) for new in counts), lambda: step(1))

    def empty(self) -> Cache:
        """A cache without turns."""
        cache: Cache = self._empty()
        return cache

    def advance(
        self, cache: Cache, turns: np.ndarray, start: np.ndarray, count: np.ndarray, query: np.ndarray
    ) -> tuple[np.ndarray, Cache]:
        """Add turns to the conversations and predict (`forward.advance`); `cache` is used up.

        Returns:
            Predictions and their state `[B, E + 1]`, and the new cache.
        """
        batch, new, size = turns.shape
        buffer = self._buffers[new].take()
        packed = buffer.view
        packed[:, : new * size] = turns.reshape(batch, new * size)
        packed[:, new * size : -2] = query
        packed[:, -2], packed[:, -1] = start, count
        answer, cache = self._advance[new](cache, buffer.argument, *self._weights)
        found = np.asarray(answer)
        self._buffers[new].give_back(buffer)
        return found, cache

    def _packed(self, new: int) -> tuple[int, int]:
        """Shape of what is sent: new turns, query and two counts."""
        return self.batch, (new + 1) * self.config.input_dim + 2


class WindowPrograms:
    """What sessions run of a model without layers: nothing of a turn is worth keeping, so nothing is.

    Attributes:
        config: The model's configuration.
        batch: How many conversations advance together.
        turn_counts: The whole window alone.
    """

    def __init__(self, config: MixConfig, program: BatchProgram, batch: int):
        self.config = config
        self.batch = batch
        self.turn_counts = (config.max_context_length,)
        self._program = program

    def empty(self) -> None:
        """There is no cache."""

    def advance(
        self, cache: None, turns: np.ndarray, start: np.ndarray, count: np.ndarray, query: np.ndarray
    ) -> tuple[np.ndarray, None]:
        """Predict from whole windows, `[B, N, D]`, of which the first `count` turns are real.

        Returns:
            Predictions and their state `[B, E + 1]`, and no cache.
        """
        mask = np.arange(turns.shape[1]) < count[:, None]
        return self._program.start(turns, query, mask).result(), None


def _advance_packed(
    config: PredictorConfig, weights: Flat, recipe: Recipe, new: int, staging: Staging
) -> Program:
    """`forward.advance` on what `SessionPrograms.advance` packs."""
    size = config.input_dim

    def packed_advance(cache: Cache, packed: jax.Array, *arguments: jax.Array) -> tuple[jax.Array, Cache]:
        packed = staging.fetched(packed)
        turns = packed[:, : new * size].reshape(packed.shape[0], new, size)
        query = packed[:, new * size : -2]
        start, count = packed[:, -2].astype(jnp.int32), packed[:, -1].astype(jnp.int32)
        answer, cache = advance(
            weights.restore(*arguments),
            cache,
            turns,
            start,
            count,
            query,
            config=config,
            attention=recipe.attention,
        )
        fresh = jnp.arange(new) < count[:, None]
        return with_state(answer, valid_input(turns, query, fresh)), cache

    return packed_advance

"""Doing a batch in turns: a share of its rows at a time, in a fraction of the memory.

Turn t takes the rows t, t + turns, t + 2 turns, ... so that rows which lie spread over devices stay where
they are: every device does its share of every turn.
"""

from typing import Any

import jax
import jax.numpy as jnp


def in_turns(tree: Any, turns: int) -> Any:
    """Every array `[B, ...]` of a pytree as `[turns, B / turns, ...]`.

    Raises:
        ValueError: If the turns do not divide B.
    """

    def split(array: jax.Array) -> jax.Array:
        rows = array.shape[0]
        if rows % turns:
            raise ValueError(f"{rows} rows cannot be done in {turns} equal turns")
        return jnp.swapaxes(array.reshape(rows // turns, turns, *array.shape[1:]), 0, 1)

    return jax.tree.map(split, tree)


def one_turn(tree: Any, number: jax.Array, turns: int) -> Any:
    """What `in_turns(tree, turns)` has at `number`, without a copy of the rest."""

    def pick(array: jax.Array) -> jax.Array:
        apart = array.reshape(-1, turns, *array.shape[1:])
        picked: jax.Array = jax.lax.dynamic_index_in_dim(apart, number, axis=1, keepdims=False)
        return picked

    return jax.tree.map(pick, tree)


def rejoined(tree: Any) -> Any:
    """The inverse of `in_turns`: `[turns, B / turns, ...]` as `[B, ...]`, rows in their first order."""
    return jax.tree.map(
        lambda array: jnp.swapaxes(array, 0, 1).reshape(-1, *array.shape[2:]),
        tree,
    )

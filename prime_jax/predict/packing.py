"""One array in and one out: how a request travels to the device and its answer back.

A transfer costs tens of microseconds however small it is, so context, query and mask are written side by side
into one buffer on the host, which the program takes apart; the program appends to every answer whether its
input and itself are sound, so that nobody has to look at the numbers on the host. For the same reason all
short parameters (biases, norms) go to the program as one vector: every argument costs a microsecond or two.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from prime_jax.predict.inputs import LARGEST_NORM, LEAST_NORM, Vectors

ALIGNED = 64  # bytes; what XLA asks for to read a numpy array in place on CPUs
OFF_UNIT = 2e-3
"""How far the squared norm of an answer may be from 1."""
SOUND, BAD_INPUT, BAD_ANSWER = 0.0, 1.0, 2.0
"""What the last column of an answer says."""

Unpacked = tuple[Float[Array, "B N D"], Float[Array, "B D"], Bool[Array, "B N"]]


class Packing(NamedTuple):
    """How requests of one shape lie in their buffer, `[batch, width]`.

    Attributes:
        batch: Rows of the compiled program.
        turns: Turns N of a row.
        dim: Dimension D of an embedding.
        round_context: Whether the turns are rounded to bfloat16 on the way into the buffer: right where the
            program rounds them anyway, and half of what is copied.
        round_query: The same for the query.
    """

    batch: int
    turns: int
    dim: int
    round_context: bool = False
    round_query: bool = False

    @property
    def words(self) -> bool:
        """Whether the buffer is made of 16-bit words, two for a float32; else of float32."""
        return self.round_context or self.round_query

    @property
    def ends(self) -> tuple[int, int, int]:
        """Where context, query and mask end in a row."""
        wide = 2 if self.words else 1
        context = self.turns * self.dim * (1 if self.round_context else wide)
        query = context + self.dim * (1 if self.round_query else wide)
        return context, query, query + self.turns

    def shape(self) -> jax.ShapeDtypeStruct:
        """What the program takes."""
        return jax.ShapeDtypeStruct((self.batch, self.ends[-1]), jnp.uint16 if self.words else jnp.float32)

    def buffer(self) -> np.ndarray:
        """An empty buffer that XLA can read in place."""
        shape = self.shape()
        raw = np.zeros(int(np.prod(shape.shape)) * shape.dtype.itemsize + ALIGNED, np.uint8)
        start = -raw.ctypes.data % ALIGNED
        buffer: np.ndarray = raw[start : len(raw) - ALIGNED + start].view(shape.dtype).reshape(shape.shape)
        return buffer

    def pack(self, buffer: np.ndarray, context: Vectors, query: Vectors, mask: np.ndarray) -> None:
        """Write a request of up to `batch` rows and `turns` turns into a buffer.

        What an earlier request left behind stays where no mask or row shows it.
        """
        rows, turns = mask.shape
        context_end, query_end, mask_end = self.ends
        at = (rows, turns, self.dim)
        _write(buffer[:rows, :context_end], context.reshape(rows, turns * self.dim), self.round_context)
        _write(buffer[:rows, context_end:query_end], query.reshape(at[::2]), self.round_query)
        buffer[:rows, query_end : query_end + turns] = mask
        buffer[:rows, query_end + turns : mask_end] = 0

    def unpack(self, packed: Array) -> Unpacked:
        """Context, query and mask inside the program."""
        context_end, query_end, mask_end = self.ends
        context = _read(packed[:, :context_end], self.round_context)
        query = _read(packed[:, context_end:query_end], self.round_query)
        mask = packed[:, query_end:mask_end] != 0
        return context.reshape(self.batch, self.turns, self.dim), query, mask


def _write(into: np.ndarray, values: Vectors, rounded: bool) -> None:
    """Values `[rows, n]` into the first columns of their part of a buffer."""
    if into.dtype == np.float32:
        into[:, : values.shape[1]] = values
        return
    part = into.view(jnp.bfloat16 if rounded else np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # the program refuses what does not fit
        part[:, : values.shape[1]] = values


def _read(part: Array, rounded: bool) -> Float[Array, "B n"]:
    if part.dtype == jnp.float32:
        return part
    if rounded:
        return jax.lax.bitcast_convert_type(part, jnp.bfloat16).astype(jnp.float32)
    halves = part.reshape(part.shape[0], part.shape[1] // 2, 2)
    whole: Array = jax.lax.bitcast_convert_type(halves, jnp.float32)
    return whole


def valid_input(
    context: Float[Array, "B N D"], query: Float[Array, "B D"], real: Bool[Array, "B N"]
) -> Bool[Array, " B"]:
    """What `inputs.check_values` checks, on the device: True for the rows whose numbers can be embeddings."""
    asked = jnp.sum(query * query, axis=-1)
    turns = jnp.sum(context * context, axis=-1)
    bits = jax.lax.bitcast_convert_type(context, jnp.uint32) << 1  # without signs; comparing numbers may take
    silent = jnp.all(bits == 0, axis=-1)  # denormal ones, which misread bytes often are, for zero
    return _in_bounds(asked) & jnp.all(_in_bounds(turns) | silent | ~real, axis=1)


def _in_bounds(squared: Float[Array, "*a"]) -> Bool[Array, "*a"]:
    return (squared >= LEAST_NORM**2) & (squared <= LARGEST_NORM**2)  # False for NaN


def with_state(answer: Float[Array, "B E"], sound: Bool[Array, " B"]) -> Float[Array, "B F"]:
    """The answer with one column more, which says whether it and its input are sound."""
    unit = jnp.abs(jnp.sum(answer * answer, axis=-1) - 1) <= OFF_UNIT  # False for NaN
    state = jnp.where(sound, jnp.where(unit, SOUND, BAD_ANSWER), BAD_INPUT)
    return jnp.concatenate([answer, state[:, None]], axis=1)


class Flat(NamedTuple):
    """Arrays of a pytree as few arguments of a program.

    Attributes:
        arguments: One vector of all float32 leaves with at most one axis, then the other leaves.
        restore: Gives the pytree from such arguments, inside a program.
    """

    arguments: tuple[Array, ...]
    restore: Callable[..., Any]


def flat(tree: Any) -> Flat:
    """Few arguments that hold a pytree of weights."""
    leaves, structure = jax.tree.flatten(tree)
    short = [leaf.ndim <= 1 and leaf.dtype == jnp.float32 for leaf in leaves]
    shapes = [leaf.shape for leaf in leaves]
    host = [np.asarray(leaf).reshape(-1) for leaf, joins in zip(leaves, short, strict=True) if joins]
    vector = jnp.asarray(np.concatenate([*host, np.zeros(1, np.float32)]))  # never empty
    others = [leaf for leaf, joins in zip(leaves, short, strict=True) if not joins]

    def restore(vector: Array, *others: Array) -> Any:
        remaining, found, start = iter(others), [], 0
        for shape, joins in zip(shapes, short, strict=True):
            if not joins:
                found.append(next(remaining))
                continue
            size = int(np.prod(shape))
            found.append(vector[start : start + size].reshape(shape))
            start += size
        return jax.tree.unflatten(structure, found)

    return Flat((vector, *others), restore)

"""One array in and one out: how a request travels to the device and its answer back.

A transfer costs tens of microseconds however small it is, so context, query and mask are written side by side
into one buffer on the host, which the program takes apart; the program appends to every answer whether its
input and itself are sound, so that nobody has to look at the numbers on the host. For the same reason all
short parameters (biases, norms) go to the program as one vector: every argument costs a microsecond or two.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from prime_jax.predict.inputs import LARGEST_NORM, LEAST_NORM, Vectors
from prime_jax.predict.staging import in_parts

OFF_UNIT = 2e-3
"""How far the squared norm of an answer may be from 1."""
SOUND, BAD_INPUT, BAD_ANSWER = 0.0, 1.0, 2.0
"""What the last column of an answer says."""

Unpacked = tuple[Float[Array, "B N D"], Float[Array, "B D"], Bool[Array, "B N"]]


class Packing(NamedTuple):
    """How requests of one shape lie in their buffer, float32, `[batch, width]`.

    Attributes:
        batch: Rows of the compiled program.
        turns: Turns N of a row.
        dim: Dimension D of an embedding.
    """

    batch: int
    turns: int
    dim: int

    @property
    def ends(self) -> tuple[int, int, int]:
        """Where context, query and mask end in a row."""
        context = self.turns * self.dim
        return context, context + self.dim, context + self.dim + self.turns

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the buffer."""
        return self.batch, self.ends[-1]

    def pack(self, buffer: np.ndarray, context: Vectors, query: Vectors, mask: np.ndarray) -> None:
        """Write a request of up to `batch` rows and `turns` turns into a buffer.

        What an earlier request left behind stays where no mask or row shows it.
        """
        rows, turns = mask.shape
        context_end, query_end, mask_end = self.ends
        flat = context.reshape(rows, turns * self.dim)

        def write(part: slice) -> None:
            buffer[part, : flat.shape[1]] = flat[part]
            buffer[part, context_end:query_end] = query[part]
            buffer[part, query_end : query_end + turns] = mask[part]
            buffer[part, query_end + turns : mask_end] = 0

        in_parts(write, rows, flat.nbytes)

    def unpack(self, packed: Float[Array, "B width"]) -> Unpacked:
        """Context, query and mask inside the program."""
        context_end, query_end, mask_end = self.ends
        context, query = packed[:, :context_end], packed[:, context_end:query_end]
        mask = packed[:, query_end:mask_end] != 0
        return context.reshape(self.batch, self.turns, self.dim), query, mask


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
    width = answer.shape[1]
    last = jnp.arange(width + 1) == width  # XLA for GPUs fails to fuse a concatenation with what is before it
    return jnp.where(last, state[:, None], jnp.pad(answer, ((0, 0), (0, 1))))


class Flat(NamedTuple):
    """Arrays of a pytree as few arguments of a program.

    Attributes:
        arguments: One vector of all float32 leaves with at most one axis, then the other leaves.
        restore: Gives the pytree from such arguments, inside a program.
    """

    arguments: tuple[Array, ...]
    restore: Callable[..., Any]

    @property
    def device(self) -> jax.Device | None:
        """The one device that holds all of them; None where there are several."""
        return _only_device(self.arguments)


def flat(tree: Any) -> Flat:
    """Few arguments that hold a pytree of weights."""
    leaves, structure = jax.tree.flatten(tree)
    short = [leaf.ndim <= 1 and leaf.dtype == jnp.float32 for leaf in leaves]
    shapes = [leaf.shape for leaf in leaves]
    host = [np.asarray(leaf).reshape(-1) for leaf, joins in zip(leaves, short, strict=True) if joins]
    others = [leaf for leaf, joins in zip(leaves, short, strict=True) if not joins]
    with jax.default_device(_only_device(others)):  # beside the matrices
        vector = jnp.asarray(np.concatenate([*host, np.zeros(1, np.float32)]))  # never empty

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


def _only_device(arrays: Iterable[Array]) -> jax.Device | None:
    devices: set[jax.Device] = {device for array in arrays for device in array.devices()}
    return devices.pop() if len(devices) == 1 else None

"""Where requests are written for the device and where its answers arrive.

A GPU reads and writes page-locked memory of the host by itself. What lies in ordinary memory is copied into
such memory first, and the caller waits for each copy: 0.3 ms of a call of 0.7 ms, measured on an H200. So
requests are packed into page-locked buffers that are kept, and programs fetch their input and deliver their
answer themselves. On a CPU the program reads the packed request where it lies.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ALIGNED = 64  # bytes; what XLA asks for to read a numpy array in place on CPUs
IN_PARTS_FROM = 2**21  # bytes of a buffer that several threads fill together
COPYING_THREADS = 4


class Buffer(NamedTuple):
    """Memory for one request.

    Attributes:
        view: To write into.
        argument: The same memory as the program takes it.
    """

    view: np.ndarray
    argument: Any


class Staging:
    """How requests and answers travel between the host and one device.

    Args:
        device: Where the programs run; None where that is more than one: JAX sends the requests itself then.
        page_locked: Whether programs read and write memory of the host themselves; None: where that pays.

    Attributes:
        page_locked: Whether they do.
        answers: Where a program leaves an answer, for `jax.jit`; None where nothing has to be said.
        kept: The same of what it goes on with.
    """

    def __init__(self, device: jax.Device | None, page_locked: bool | None = None):
        self.page_locked = False
        self.answers: jax.sharding.Sharding | None = None
        self.kept: jax.sharding.Sharding | None = None
        if device is not None and (has_page_locked(device) if page_locked is None else page_locked):
            self.page_locked = True
            self.answers = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
            self.kept = jax.sharding.SingleDeviceSharding(device)

    def shape(self, shape: tuple[int, int]) -> jax.ShapeDtypeStruct:
        """The packed request as an argument to compile for; float32."""
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=self.answers)

    def fetched(self, packed: jax.Array) -> jax.Array:
        """The packed request in the device's memory, inside a program."""
        if not self.page_locked:
            return packed
        there: jax.Array = jax.device_put(packed, jax.memory.Space.Device)
        return there

    def buffer(self, shape: tuple[int, int]) -> Buffer:
        """New memory for a request, all zeros."""
        if not self.page_locked:
            view = aligned(shape)
            return Buffer(view, view)
        held = jax.device_put(np.zeros(shape, np.float32), self.answers)
        held.block_until_ready()
        address = held.unsafe_buffer_pointer()  # nobody else has this array, so that writing into it is safe
        numbers: Any = (ctypes.c_float * held.size).from_address(address)
        numbers.held = held  # the memory lives as long as anybody can write into it
        return Buffer(np.ctypeslib.as_array(numbers).reshape(shape), held)

    def send_for(self, answer: jax.Array) -> None:
        """Start to copy an answer to the host, where the program does not do it itself."""
        if not self.page_locked and jax.default_backend() != "cpu":
            answer.copy_to_host_async()


class Buffers:
    """The buffers of one shape, used again and again. Safe to share between threads.

    A buffer that an error keeps from being given back is not used again.

    Args:
        staging: Where they are made.
        shape: Theirs.
    """

    def __init__(self, staging: Staging, shape: tuple[int, int]):
        self._staging = staging
        self._shape = shape
        self._free: list[Buffer] = []  # a list's append and pop are atomic

    def take(self) -> Buffer:
        """One that nobody uses, a new one where there is none."""
        try:
            return self._free.pop()
        except IndexError:
            return self._staging.buffer(self._shape)

    def give_back(self, buffer: Buffer) -> None:
        """To be called once the device has read it: when the answer is there."""
        self._free.append(buffer)


def has_page_locked(device: jax.Device) -> bool:
    """Whether page-locked memory of the host is worth using, and this version of JAX can."""
    if device.platform != "gpu" or not hasattr(jax, "memory"):
        return False
    return any(memory.kind == "pinned_host" for memory in device.addressable_memories())


def aligned(shape: tuple[int, int]) -> np.ndarray:
    """Zeros that XLA can read in place, float32."""
    raw = np.zeros(4 * int(np.prod(shape)) + ALIGNED, np.uint8)
    start = -raw.ctypes.data % ALIGNED
    view: np.ndarray = raw[start : len(raw) - ALIGNED + start].view(np.float32).reshape(shape)
    return view


def in_parts(write: Callable[[slice], None], rows: int, size: int) -> None:
    """Write the rows of a buffer of `size` bytes, by several threads where it is large."""
    threads = min(COPYING_THREADS, os.cpu_count() or 1, rows)
    if size < IN_PARTS_FROM or threads < 2:
        write(slice(0, rows))
        return
    ends = np.linspace(0, rows, threads + 1).astype(int)
    try:
        parts = _copying().map(write, (slice(*pair) for pair in pairwise(ends)))
    except RuntimeError:  # the interpreter is about to end and starts no work any more
        write(slice(0, rows))
        return
    list(parts)


@cache
def _copying() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(COPYING_THREADS, thread_name_prefix="prime-jax-copy")


if hasattr(os, "register_at_fork"):  # a forked process has none of these threads
    os.register_at_fork(after_in_child=_copying.cache_clear)

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
        device: Where the programs run.
        page_locked: Whether programs read and write memory of the host themselves; None: where that pays.
    """

    def __init__(self, device: jax.Device, page_locked: bool | None = None):
        self.page_locked = has_page_locked(device) if page_locked is None else page_locked
        self._there = jax.sharding.SingleDeviceSharding(device)
        self._here = (
            jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
            if self.page_locked
            else self._there
        )

    @property
    def answers(self) -> jax.sharding.Sharding | None:
        """Where a program leaves an answer, for `jax.jit`; None where nothing has to be said."""
        return self._here if self.page_locked else None

    @property
    def kept(self) -> jax.sharding.Sharding | None:
        """Where a program leaves what it goes on with, for `jax.jit`."""
        return self._there if self.page_locked else None

    def shape(self, shape: tuple[int, int]) -> jax.ShapeDtypeStruct:
        """The packed request as an argument to compile for; float32."""
        where = self._here if self.page_locked else None
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)

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
        held = jax.device_put(np.zeros(shape, np.float32), self._here)
        held.block_until_ready()
        address = held.unsafe_buffer_pointer()  # nobody else has this array, so that writing into it is safe
        numbers = (ctypes.c_float * held.size).from_address(address)
        return Buffer(np.ctypeslib.as_array(numbers).reshape(shape), held)

    def send_for(self, answer: jax.Array) -> None:
        """Start to copy an answer to the host, where the program does not do it itself."""
        if not self.page_locked and jax.default_backend() != "cpu":
            answer.copy_to_host_async()


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
    list(_copying().map(write, (slice(*pair) for pair in pairwise(ends))))


@cache
def _copying() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(COPYING_THREADS, thread_name_prefix="prime-jax-copy")

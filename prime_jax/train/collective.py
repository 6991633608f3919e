"""What the processes of a run do together: wait for each other, agree, and leave reports to the first."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

from prime_jax.progress import console


def is_main() -> bool:
    """Whether this is the first process, the one that writes reports."""
    return jax.process_index() == 0


def say(words: str) -> None:
    """Print a line, once per run."""
    if is_main():
        console.print(words, soft_wrap=True)


def barrier(name: str) -> None:
    """Wait until every process is here; nothing where there is one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextmanager
def in_turn(name: str) -> Iterator[None]:
    """The block, first in the first process alone, then in all others."""
    if not is_main():
        barrier(name)
    yield
    if is_main():
        barrier(name)


def any_process(wish: bool) -> bool:
    """Whether any process has this wish; all of them get the same answer, and wait for each other for it."""
    if jax.process_count() == 1:
        return wish
    return bool(np.any(multihost_utils.process_allgather(np.asarray(wish))))

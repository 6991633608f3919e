"""Checking the shards of an embedding store: every byte as the index says, every number finite.

Reading gigabytes takes seconds, and a run may be started often. So what was found whole is noted beside the
shards with size, times and inode of the file, and is checked again only when one of these changed. The note
is data: one that is damaged or cannot be written costs another reading, nothing else.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from prime_jax import files
from prime_jax.errors import DataError
from prime_jax.progress import progress

NOTE = "verified.json"
_SETTLED = 2.0  # seconds after which a file system's clock tells a later change from this one
_ROWS = 4096
_TRIES = 3


class Shard(NamedTuple):
    """A shard to check.

    Attributes:
        path: Its file.
        sha256: What the index says of it.
        embeddings: Its rows, `[n, D]`.
        start: The store's number of its first row.
    """

    path: Path
    sha256: str
    embeddings: npt.NDArray[Any]
    start: int


def check_shards(folder: Path, shards: Sequence[Shard], *, again: bool = True) -> None:
    """Compare every shard with its SHA-256 and look for NaN and Inf.

    Args:
        folder: The store, where what was found whole is noted.
        shards: Its shards.
        again: Check also what was noted and did not change since.

    Raises:
        DataError: If one differs or holds NaN or Inf; the message names file and row.
    """
    began = time.time()
    noted = {} if again else _read_note(folder / NOTE)
    found = {shard.path.name: _facts(shard) for shard in shards}
    due = [shard for shard in shards if noted.get(shard.path.name) != found[shard.path.name]]
    if not due:
        return
    workers = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # hashing leaves Python free
    with progress("checking embeddings", len(due), "shards") as advance, workers as pool:
        checked = pool.map(lambda shard: _check(shard, found[shard.path.name], advance), due)
        found.update((shard.path.name, facts) for shard, facts in zip(due, checked, strict=True))
    _write_note(folder / NOTE, found, noted, began)


def _check(shard: Shard, facts: dict[str, Any], advance: Callable[..., None]) -> dict[str, Any]:
    """The facts of a shard as it was when it was read from its first to its last byte.

    Args:
        shard: The shard.
        facts: What they were before.
        advance: Called when it is done.

    Raises:
        DataError: If it is not as the index says, or changes all the time.
    """
    for _ in range(_TRIES):
        _check_content(shard)
        before, facts = facts, _facts(shard)
        if facts == before:
            advance(1)
            return facts
    raise DataError(
        f"{shard.path}: changes while it is checked; end the program that writes there, and start again"
    )


def _check_content(shard: Shard) -> None:
    if files.sha256(shard.path) != shard.sha256:
        raise DataError(
            f"{shard.path}: damaged or changed, its SHA-256 differs from index.json; bring the file back, or "
            f"delete {shard.path.parent} and encode again"
        )
    for start in range(0, len(shard.embeddings), _ROWS):
        finite = np.isfinite(shard.embeddings[start : start + _ROWS]).all(axis=1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise DataError(
                f"{shard.path}: row {row} (row {shard.start + row} of the store) holds NaN or Inf; delete "
                f"{shard.path.parent} and encode again"
            )


def _facts(shard: Shard) -> dict[str, Any]:
    """What changes when the file does; no program sets the second time by itself."""
    seen = shard.path.stat()
    return {
        "bytes": seen.st_size,
        "mtime_ns": seen.st_mtime_ns,
        "ctime_ns": seen.st_ctime_ns,
        "inode": seen.st_ino,
        "sha256": shard.sha256,
    }


def _read_note(path: Path) -> dict[str, Any]:
    try:
        noted = files.read_json(path, DataError)["shards"]
    except (DataError, OSError, TypeError, KeyError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _write_note(path: Path, found: dict[str, Any], before: dict[str, Any], began: float) -> None:
    """Note all shards but those written just before the check `began`.

    A change in the same moment as the one before it would have left the same times.
    """
    noted = {}
    for name, facts in found.items():
        settled = began - max(facts["mtime_ns"], facts["ctime_ns"]) / 1e9 > _SETTLED
        if settled or before.get(name) == facts:
            noted[name] = facts
    if noted != before:
        with suppress(OSError):  # a folder that is only read: checked again the next time
            files.write_json(path, {"shards": noted})

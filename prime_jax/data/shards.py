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
    noted = {} if again else _read_note(folder / NOTE)
    due = [shard for shard in shards if noted.get(shard.path.name) != _facts(shard)]
    if not due:
        return
    workers = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # hashing leaves Python free
    with progress("checking embeddings", len(due), "shards") as advance, workers as pool:
        list(pool.map(lambda shard: _check(shard, advance), due))
    _write_note(folder / NOTE, shards, noted)


def _check(shard: Shard, advance: Callable[..., None]) -> None:
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
    advance(1)


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


def _write_note(path: Path, shards: Sequence[Shard], before: dict[str, Any]) -> None:
    """Note all shards but those written just now: a change in the same moment would have the same times."""
    now, noted = time.time(), {}
    for shard in shards:
        facts = _facts(shard)
        settled = now - max(facts["mtime_ns"], facts["ctime_ns"]) / 1e9 > _SETTLED
        if settled or before.get(shard.path.name) == facts:
            noted[shard.path.name] = facts
    if noted != before:
        with suppress(OSError):  # a folder that is only read: checked again the next time
            files.write_json(path, {"shards": noted})

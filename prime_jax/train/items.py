"""The items of a checkpoint (`params`, `state`, ...): read with Orbax from a path of any name, or missing."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from prime_jax.errors import CheckpointError
from prime_jax.train.plain_paths import plain_path


def check_written(folder: Path, names: Iterable[str]) -> None:
    """Refuse a checkpoint of which Orbax reports success and that lies elsewhere, or nowhere.

    Raises:
        CheckpointError: If an item has no folder, or an empty one; the message names it.
    """
    for name in names:
        item = folder / name
        if not item.is_dir() or not any(item.iterdir()):
            raise CheckpointError(f"the arrays of {item} were not written there")


def read_item(folder: Path, like: Any) -> Any:
    """The arrays of an item, laid out as `like` says; None takes them as they were written.

    Raises:
        CheckpointError: If they cannot be read, or have another structure.
    """
    try:
        with plain_path(folder) as path, ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, like)
    except Exception as failed:  # Orbax and TensorStore raise many kinds
        raise CheckpointError(f"{folder}: cannot be restored into this model: {failed}") from failed


def read_item_here(folder: Path) -> Any:
    """The arrays of an item as its files describe them, all on one device, wherever they were written.

    Raises:
        CheckpointError: As `read_item`.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        with plain_path(folder) as path, ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.metadata(path).item_metadata.tree
    except Exception as failed:  # as above
        raise CheckpointError(f"{folder}: does not say what it holds: {failed}") from failed
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree)
    return read_item(folder, like)

"""Tensors of a Hugging Face folder: one safetensors file, or shards with an index; checked when taken."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from prime_jax import files
from prime_jax.errors import DataError
from prime_jax.nn.encoders import EncoderModel
from prime_jax.nn.torch_layout import encoder_slots

SINGLE = "model.safetensors"
SHARDED = "model.safetensors.index.json"
FLOATS = ("F32", "F16", "BF16")


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of `folder`, in a fixed order.

    Raises:
        DataError: If there are none, or the index is malformed or names a file that is not there.
    """
    index = folder / SHARDED
    if not index.exists():
        if not (folder / SINGLE).is_file():
            raise DataError(
                f"{folder / SINGLE}: the file is missing (weights must be safetensors, not pickles)"
            )
        return [folder / SINGLE]
    content = files.read_json(index, DataError)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise DataError(f"{index}: no weight_map from tensor names to files")
    for name in sorted(set(names.values())):
        if Path(name).name != name:
            raise DataError(f"{index}: the path {name!r} leaves the folder")
        if not (folder / name).is_file():
            raise DataError(f"{folder / name}: listed in {SHARDED} but missing")
    return [folder / name for name in sorted(set(names.values()))]


class Weights:
    """All tensors of a folder; nothing is read from disk before it is taken.

    A file is opened anew for every tensor: a file that stays open keeps in memory what was read of it.

    Args:
        folder: Where the safetensors files are.
        rename: Gives the name to take a tensor by from the name it is stored under.

    Raises:
        DataError: If a file is missing or damaged, or two tensors have the same name after `rename`.
    """

    def __init__(self, folder: Path, rename: Callable[[str], str] = str):
        self._found: dict[str, tuple[Path, str]] = {}
        self._taken: set[str] = set()
        self._paths = weight_files(folder)
        for path in self._paths:
            for stored in [*_opened(path).keys()]:  # the handle is no dict and cannot be iterated
                name = rename(stored)
                if name in self._found:
                    other = self._found[name][1]
                    raise DataError(f"{path}: tensor {stored!r} comes twice, also as {other!r}")
                self._found[name] = (path, stored)

    def take(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """Read a tensor as float32.

        Raises:
            DataError: If it is missing, not floating point, or of another shape; names file and tensor.
        """
        if name not in self._found:
            raise DataError(f"{', '.join(map(str, self._paths))}: tensor {name!r} is missing")
        path, stored = self._found[name]
        opened = _opened(path)
        tensor = opened.get_slice(stored)
        if tensor.get_dtype() not in FLOATS:
            raise DataError(
                f"{path}: tensor {stored!r} has dtype {tensor.get_dtype()}, not one of {', '.join(FLOATS)}"
            )
        if tuple(tensor.get_shape()) != shape:
            raise DataError(
                f"{path}: tensor {stored!r} has shape {tuple(tensor.get_shape())}, expected {shape} "
                "(as config.json says)"
            )
        self._taken.add(name)
        values: npt.NDArray[Any] = opened.get_tensor(stored)
        return values.astype(np.float32, copy=False)

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._found)

    def unread(self) -> list[str]:
        """Names of the tensors nobody has taken, sorted."""
        return sorted(self._found.keys() - self._taken)


def fill_encoder(
    model: EncoderModel,
    weights: Weights,
    folder: Path,
    dtype: DTypeLike,
    *,
    belonging: tuple[str, ...],
    known: tuple[str, ...] = (),
) -> None:
    """Put the weights of a folder into a model of shapes.

    Args:
        model: Its parameters are replaced.
        weights: By the names of `encoder_slots`.
        folder: For messages.
        dtype: Of the matrices of its layers; all else is float32.
        belonging: How the names of an encoder's tensors begin; one of them without a place is an error.
        known: Names of those that may be left over.

    Raises:
        DataError: If a tensor is missing, left over, or of another shape or dtype than it should be.
    """
    for slot in encoder_slots(model):
        slot.fill(partial(weights.take, shape=slot.shape), dtype if slot.transposed else jnp.float32)
    unread = [name for name in weights.unread() if name.startswith(belonging) and name not in known]
    if unread:
        raise DataError(f"{folder}: config.json has no place for the tensors {', '.join(unread[:3])}")


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as broken:
        raise DataError(f"{path}: not a readable safetensors file ({broken})") from None

"""Reading the JAX model back out of an exported bundle."""

from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pydantic
from jaxtyping import Array

from prime_jax.errors import CheckpointError, first_fault
from prime_jax.files import read_json
from prime_jax.manifest import MANIFEST, read_manifest, verify_manifest
from prime_jax.models import Model, ModelConfig, model_config
from prime_jax.models.state_dict import load_state_dict

KIND = "bundle"
TARGET_HEAD = "target_head.safetensors"  # where the memory must be mapped before it is searched


class LoadedBundle(NamedTuple):
    """A model read from a bundle.

    Attributes:
        model: The model, float32.
        manifest: What the bundle says of itself.
        target_head: Kernel that the memory is mapped by before it is searched, `[E, E]`, or None.
    """

    model: Model
    manifest: dict[str, Any]
    target_head: Array | None


def is_bundle(folder: Path) -> bool:
    """Whether a folder holds a bundle, damaged or not in its other files.

    Raises:
        CheckpointError: If it has a manifest that cannot be read.
    """
    return (folder / MANIFEST).is_file() and read_manifest(folder)["kind"] == KIND


def load_bundle(folder: Path) -> LoadedBundle:
    """Verify every file of a bundle and build its model.

    Raises:
        CheckpointError: If a file is missing, damaged or does not fit; the message names it.
    """
    manifest = verify_manifest(folder, KIND)
    model = load_state_dict(read_config(folder), read_tensors(folder / "model.safetensors"))
    head = None
    if (folder / TARGET_HEAD).is_file():
        tensors, size = read_tensors(folder / TARGET_HEAD), model.config.output_dim
        if "kernel" not in tensors or tensors["kernel"].shape != (size, size):
            raise CheckpointError(f"{folder / TARGET_HEAD}: holds no kernel of shape ({size}, {size})")
        head = jnp.asarray(tensors["kernel"])
    return LoadedBundle(model, manifest, head)


def read_config(folder: Path) -> ModelConfig:
    """The model section of a bundle's config.json.

    Raises:
        CheckpointError: If the file is missing, or does not describe a model.
    """
    path = folder / "config.json"
    try:
        return model_config(read_json(path)["model"])
    except pydantic.ValidationError as unfit:
        raise CheckpointError(f"{path}: does not describe a model ({first_fault(unfit)})") from None
    except (KeyError, TypeError) as unfit:
        raise CheckpointError(
            f"{path}: does not describe a model ({type(unfit).__name__}: {unfit})"
        ) from None


def read_tensors(path: Path) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """The arrays of a safetensors file by name.

    Raises:
        CheckpointError: If it is missing or no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing") from None
    except (SafetensorError, KeyError) as broken:  # KeyError: a type that numpy does not have
        raise CheckpointError(f"{path}: damaged, not a safetensors file ({broken})") from None

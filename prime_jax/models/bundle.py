"""Reading the JAX model back out of an exported bundle."""

from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import pydantic
from jaxtyping import Array

from prime_jax.errors import CheckpointError
from prime_jax.files import read_json
from prime_jax.manifest import MANIFEST, read_manifest, verify_manifest
from prime_jax.models import ModelConfig
from prime_jax.models.prime import EmbeddingPredictor
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

    model: EmbeddingPredictor
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
    from safetensors.numpy import load_file

    manifest = verify_manifest(folder, KIND)
    settings = read_json(folder / "config.json")
    try:
        config = ModelConfig(**settings["model"])
    except (KeyError, TypeError, pydantic.ValidationError) as unfit:
        raise CheckpointError(f"{folder / 'config.json'}: does not describe a model: {unfit}") from None
    model = load_state_dict(config, load_file(folder / "model.safetensors"))
    file = folder / TARGET_HEAD
    head = jnp.asarray(load_file(file)["kernel"]) if file.is_file() else None
    return LoadedBundle(model, manifest, head)

"""What the benchmarks of serving share: the model they serve, the requests they send, and the machine."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from pydantic import ValidationError

from prime_jax._version import __version__
from prime_jax.config import Config, read_config
from prime_jax.models import AnyConfig
from prime_jax.models.prime import EmbeddingPredictor, PredictorConfig

CONFIG = Path(__file__).parents[1] / "configs" / "prime_small.yaml"


class Asked(NamedTuple):
    """One request: the turns `[n, D]`, n from 1 to N, and the query `[D]`."""

    context: np.ndarray
    query: np.ndarray


def random_model(file: Path = CONFIG) -> EmbeddingPredictor:
    """A configuration's model with random weights, its gate open: closed, it would ignore its own layers."""
    config = read_config(file).model
    assert isinstance(config, PredictorConfig)
    model = config.build(rngs=nnx.Rngs(0))
    if config.residual != "none":
        model.residual_gate[...] = 1.0
    return model


def sample(config: AnyConfig, count: int) -> list[Asked]:
    """Random unit vectors as requests; the i-th has 1 + i % N turns."""
    random = np.random.default_rng(0)

    def unit(*shape: int) -> np.ndarray:
        vectors = random.normal(size=(*shape, config.input_dim)).astype(np.float32)
        return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))

    return [Asked(unit(1 + row % config.max_context_length), unit()) for row in range(count)]


def with_defaults(recorded: dict[str, Any], exclude: Any) -> dict[str, Any]:
    """A configuration as a file of results has it, with what was not there to be set when that was written.

    A setting that is added later stands at what was done before, so results of before remain good.
    """
    try:
        return Config.model_validate(recorded).model_dump(mode="json", exclude=exclude)
    except ValidationError:  # a setting is gone: as it is, the two will differ
        return recorded


def facts(*packages: str) -> dict[str, Any]:
    """Versions and machine, for the file of results; a package that is not installed has version None."""
    return {
        "prime_jax": __version__,
        "versions": {
            "python": platform.python_version(),
            **{name: installed_version(name) for name in packages},
        },
        "machine": {
            "device": _device(),
            "cores": os.cpu_count(),
            "platform": platform.platform(),
            **({"driver": driver} if (driver := gpu_driver()) else {}),
        },
    }


def installed_version(package: str) -> str | None:
    """A package's version, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def gpu_driver() -> str | None:
    """Version of the NVIDIA driver, None where there is none or it does not answer."""
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return asked.stdout.strip().splitlines()[0] if asked.stdout.strip() else None


def _device() -> str:
    if jax.default_backend() != "cpu":
        return str(jax.devices()[0].device_kind)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "cpu")

"""An adapter: what a text predictor adds to its encoder, a file of one to three megabytes in place of ninety.

The file holds, for every matrix of the encoder's layers, the low-rank update `a @ b` that training made
(LoRA, arXiv 2106.09685), and says which encoder it belongs to. Nothing in it names code.
`prime_jax.export.adapter` writes it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy import ndarray

from prime_jax.errors import CheckpointError
from prime_jax.models.bundle import read_tensors

FORMAT = "prime-jax adapter 1"
GENERAL = Path(__file__).with_name("general.safetensors")
"""The adapter of MiniLM that comes with the package (docs/general.md)."""
MOST_BYTES = 64 * 1024 * 1024
FLOAT32 = np.dtype(np.float32)
_FACTS = {
    "query_prefix": str,
    "passage_prefix": str,
    "data_hash": str,
    "licence": str,
    "attribution": str,
    "metrics": dict,
    "share": float,
}
"""What a file may say beside its format, its encoder and its model."""


def read_facts(file: Path) -> dict[str, Any]:
    """What an adapter's file says of itself: `encoder`, `model`, and those of `_FACTS` that it has.

    Raises:
        CheckpointError: If it is missing, damaged, or something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"{file.stat().st_size:,} bytes are none")
        with safe_open(file, framework="numpy") as opened:
            told: Any = json.loads(opened.metadata()["prime_jax"])
    except FileNotFoundError:
        raise CheckpointError(f"{file}: the file is missing") from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as broken:
        raise CheckpointError(f"{file}: not an adapter ({broken})") from None
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise CheckpointError(f"{file}: not an adapter of the format {FORMAT!r}")
    if not isinstance(told.get("model"), dict) or not isinstance(told.get("encoder"), str):
        raise CheckpointError(f"{file}: does not describe a model, or not the encoder that it belongs to")
    for name, kind in _FACTS.items():
        if name in told and not isinstance(told[name], kind):
            raise CheckpointError(f"{file}: its {name} is {told[name]!r}")
    if not 0 < told.get("share", 1.0) <= 1:
        raise CheckpointError(f"{file}: its share is {told['share']!r}, not above 0 and at most 1")
    if not all(isinstance(value, float | int) for value in told.get("metrics", {}).values()):
        raise CheckpointError(f"{file}: its metrics are {told['metrics']!r}, not numbers")
    return {name: told[name] for name in ("encoder", "model", *_FACTS) if name in told}


def with_adapter(params: Any, file: Path, share: float) -> Any:
    """Parameters of a text predictor with an adapter's updates.

    Args:
        params: Those of the encoder it belongs to, nested dicts (`starting_params`).
        file: The adapter.
        share: How much of the updates is added, 0 to 1. Less than all is worth less on the conversations that
            it was trained on, and does less harm on others (WiSE-FT, arXiv 2109.01903).

    Raises:
        CheckpointError: If the file is damaged, or a tensor has no place in these parameters.
    """
    tensors = read_tensors(file)
    for name in [name for name in tensors if name.endswith("/a") or name == "roles"]:
        if tensors[name].dtype == FLOAT32:  # anything else is refused below
            tensors[name] = tensors[name] * np.float32(share)
    return _added(params, tensors, file)


def adapter_rank(file: Path) -> int:
    """Rank of an adapter's updates.

    Raises:
        CheckpointError: If the file is damaged.
    """
    return max(
        (value.shape[-1] for name, value in read_tensors(file).items() if name.endswith("/a")), default=0
    )


def _added(params: Any, tensors: Mapping[str, ndarray], file: Path) -> Any:
    if not tensors:
        raise CheckpointError(f"{file}: holds no updates")
    open_ = dict(tensors)

    def changed(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in open_ and name == "roles":
            return _fitting(open_.pop(name), leaf.shape, name, file)
        if f"{name}/a" not in open_:
            return leaf
        a, b = open_.pop(f"{name}/a"), open_.pop(f"{name}/b", np.zeros((0, 0), np.float32))
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or {a.dtype, b.dtype} != {FLOAT32}:
            raise CheckpointError(
                f"{file}: {name} has factors of {a.dtype} {a.shape} and {b.dtype} {b.shape}, not float32 "
                "that fits together"
            )
        update = jnp.matmul(jnp.asarray(a), jnp.asarray(b), precision=jax.lax.Precision.HIGHEST)
        return leaf + _fitting(np.asarray(update), leaf.shape, name, file)

    found = jax.tree_util.tree_map_with_path(changed, params)
    for name in open_:
        raise CheckpointError(f"{file}: {name} has no place in this model")
    return found


def _fitting(value: ndarray, shape: tuple[int, ...], name: str, file: Path) -> ndarray:
    if value.shape != shape or value.dtype != np.float32 or not np.isfinite(value).all():
        raise CheckpointError(
            f"{file}: {name} must be finite float32 of shape {shape}, found {value.dtype} {value.shape}"
        )
    return value

"""A text predictor as what it adds to its encoder: a file of one to three megabytes in place of ninety.

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
from pydantic import ValidationError

from prime_jax.data.encode import Encoder, load_encoder
from prime_jax.errors import CheckpointError, ConfigError
from prime_jax.models.bundle import read_tensors
from prime_jax.models.text import TextConfig
from prime_jax.predict.predictor import Predictor
from prime_jax.pretrained.bert import BertTextEncoder
from prime_jax.train.text_start import reading_config, started_model, starting_params

FORMAT = "prime-jax adapter 1"
MOST_BYTES = 64 * 1024 * 1024
FLOAT32 = np.dtype(np.float32)
_FACTS = {"query_prefix": str, "data_hash": str, "licence": str, "attribution": str, "metrics": dict}
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
    for name, kind in _FACTS.items():
        if name in told and not isinstance(told[name], kind):
            raise CheckpointError(f"{file}: its {name} is {told[name]!r}")
    if not all(isinstance(value, float | int) for value in told.get("metrics", {}).values()):
        raise CheckpointError(f"{file}: its metrics are {told['metrics']!r}, not numbers")
    return {name: told[name] for name in ("encoder", "model", *_FACTS) if name in told}


def load_adapter(file: str | Path, encoder: Encoder | str = "minilm") -> Predictor:
    """A text predictor: an encoder with an adapter added.

    Args:
        file: What `prime_jax.export.adapter` wrote.
        encoder: The encoder it belongs to, or the name that `data.encoder` takes.

    Raises:
        CheckpointError: If the file is missing, damaged, or belongs to another encoder.
        ConfigError: If there is no such encoder.
    """
    file = Path(file)
    told = read_facts(file)
    found = load_encoder(encoder) if isinstance(encoder, str) else encoder
    if not isinstance(found, BertTextEncoder):
        raise ConfigError(f"{file}: the weights of the encoder {encoder!r} are not at hand")
    if told.get("encoder") != found.identity:
        raise CheckpointError(
            f"{file}: belongs to the encoder {told.get('encoder')}, the one given is {found.identity}"
        )
    try:
        config = reading_config(TextConfig(**told["model"]), found, str(encoder))
    except (ValidationError, KeyError, TypeError) as unfit:
        raise CheckpointError(f"{file}: does not describe a model ({unfit})") from None
    params = _added(starting_params(config, found), read_tensors(file), file)
    facts = {name: fact for name, fact in told.items() if name != "model"}
    model = started_model(config, params)
    return Predictor(model, facts={**facts, "source": str(found.source.transformer), "adapter": str(file)})


def _added(params: Any, tensors: Mapping[str, ndarray], file: Path) -> Any:
    """The parameters with an adapter's updates; every tensor must have its place."""
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
        raise CheckpointError(f"{file}: {name} has no place in this encoder")
    return found


def _fitting(value: ndarray, shape: tuple[int, ...], name: str, file: Path) -> ndarray:
    if value.shape != shape or value.dtype != np.float32 or not np.isfinite(value).all():
        raise CheckpointError(
            f"{file}: {name} must be finite float32 of shape {shape}, found {value.dtype} {value.shape}"
        )
    return value

"""Writing an adapter: what a text predictor adds to its encoder, a few megabytes instead of ninety."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from numpy import ndarray

from prime_jax.errors import ExportError
from prime_jax.files import atomic_path
from prime_jax.models.adapter import FORMAT
from prime_jax.models.text import TextPredictor
from prime_jax.predict.predictor import Predictor
from prime_jax.predict.text import encoder_of
from prime_jax.pretrained.bert import BertTextEncoder
from prime_jax.train.text_start import starting_params

TOLERANCE = 1e-4  # of a matrix's change, relative to its norm, that a product of low rank may miss
_OF_ENCODER = ("encoder", "pooling", "lower_case", "separator_id")


def write_adapter(
    model: TextPredictor, encoder: BertTextEncoder, file: Path, *, rank: int, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Write what a model adds to its encoder.

    Args:
        model: Trained with `train.lora_rank`: only low-rank updates and roles differ from the encoder.
        encoder: What it started from.
        file: Where to write, with the ending `.safetensors`.
        rank: Rank of the updates, at least that of training.
        facts: Further facts for the file, such as `licence` and `attribution`; JSON values.

    Returns:
        `bytes` of the file, and `missed`, the largest relative difference of a matrix to the model's.

    Raises:
        ExportError: If the model changed more than updates of that rank can say; the message says where.
    """
    before = dict(_leaves(starting_params(model.config, encoder)))
    after = dict(_leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    tensors: dict[str, ndarray] = {}
    missed = 0.0
    for name, now in after.items():
        change = np.asarray(now, np.float64) - np.asarray(before[name], np.float64)
        if not np.any(change):
            continue
        if name == "roles":
            tensors[name] = np.asarray(now, np.float32)
            continue
        if change.ndim != 2 or "/layers/" not in name:
            raise ExportError(
                f"{name} was trained, and an adapter holds updates of matrices in layers alone; train with "
                "train.lora_rank"
            )
        left, strength, right = np.linalg.svd(change, full_matrices=False)
        rest = float(np.linalg.norm(strength[rank:]) / np.linalg.norm(strength))
        if rest > TOLERANCE:
            raise ExportError(
                f"{name}: rank {rank} leaves {rest:.2g} of what was trained out; take that of "
                "train.lora_rank, and train with train.params_dtype float32"
            )
        missed = max(missed, rest)
        root = np.sqrt(strength[:rank])
        tensors[f"{name}/a"] = (left[:, :rank] * root).astype(np.float32)
        tensors[f"{name}/b"] = (root[:, None] * right[:rank]).astype(np.float32)
    if not tensors:
        raise ExportError("the model is its encoder as it was: there is nothing to write")
    settings = model.config.model_dump(mode="json", exclude={*_OF_ENCODER, "checkpoint_path"})
    told = {"format": FORMAT, "encoder": encoder.identity, "model": settings, **facts}
    from safetensors.numpy import save

    with atomic_path(file) as temporary:
        temporary.write_bytes(save(tensors, metadata={"prime_jax": json.dumps(told, sort_keys=True)}))
    return {"bytes": file.stat().st_size, "missed": missed}


def check_adapter_of(predictor: Predictor) -> None:
    """Refuse a run that no adapter can be written of.

    Raises:
        ExportError: Saying why.
    """
    config = predictor.config
    if config is None:
        raise ExportError("--adapter: name a run folder, which says what it was trained from")
    if not config.model.reads_text:
        raise ExportError(f"--adapter: the run's model is of kind {config.model.kind}, not text")
    if not config.train.lora_rank:
        raise ExportError("--adapter: the run was trained without train.lora_rank")


def write_adapter_of(
    predictor: Predictor, file: Path, said: Mapping[str, str | None], *, share: float | None = None
) -> None:
    """What a run adds to its encoder, as a file, with what is said of it (`licence`, `attribution`).

    `share` is how much of it is added unless told otherwise.
    """
    check_adapter_of(predictor)
    config, info = predictor.config, predictor.info()
    assert config is not None
    facts: dict[str, Any] = {name: info[name] for name in ("data_hash", "metrics") if name in info}
    facts |= {"query_prefix": config.data.query_prefix, "passage_prefix": config.data.passage_prefix}
    for name, text in said.items():  # beside those of what it started from
        words = dict.fromkeys(word for word in (text, info.get(name)) if word)
        facts |= {name: "; ".join(words)} if words else {}
    if share is not None and share != 1:
        facts["share"] = share
        facts.pop("metrics", None)  # which are those of all that was learned
    model: Any = predictor.model
    encoder: Any = encoder_of(predictor)  # the run started from it, so its weights are at hand
    rank = config.train.lora_rank + int(info.get("start", {}).get("rank", 0))
    write_adapter(model, encoder, file, rank=rank, facts=facts)


def _leaves(params: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf

"""The tensors of a ModernBERT folder, by the names of Hugging Face: read into our model, and given back."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from prime_jax.errors import DataError
from prime_jax.nn.modern_bert import ModernBertConfig, ModernBertModel
from prime_jax.pretrained.weights import Weights

Tensor = np.ndarray[Any, np.dtype[Any]]
_LAYER = {  # ours, theirs, and whether it is a matrix, which they keep [O, I]
    ("attention_norm", "scale"): ("attn_norm", False),
    ("qkv", "kernel"): ("attn.Wqkv", True),
    ("attention_out", "kernel"): ("attn.Wo", True),
    ("mlp_norm", "scale"): ("mlp_norm", False),
    ("mlp_in", "kernel"): ("mlp.Wi", True),
    ("mlp_out", "kernel"): ("mlp.Wo", True),
}


def load_modern_bert(
    folder: Path, config: ModernBertConfig, dtype: DTypeLike = jnp.float32
) -> ModernBertModel:
    """Read the weights of a folder into a `ModernBertModel`; heads on top of it are not read.

    Raises:
        DataError: If a file or tensor is missing, truncated, or of another shape or dtype than it should be.
    """
    weights = Weights(folder, lambda stored: stored.removeprefix("model."))
    model = nnx.eval_shape(lambda: ModernBertModel(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, shapes = nnx.split(model)
    params = nnx.to_pure_dict(shapes)
    for (*above, name), theirs, matrix in _names(params):
        below = params
        for part in above:
            below = below[part]
        shape = tuple(below[name].shape)
        taken = weights.take(theirs, shape[::-1] if matrix else shape)
        below[name] = jnp.asarray(taken.T, dtype) if matrix else jnp.asarray(taken)
    ours = ("embeddings.", "layers.", "final_norm.")
    unread = [name for name in weights.unread() if name.startswith(ours)]
    if unread:
        raise DataError(f"{folder}: config.json has no place for the tensors {', '.join(unread[:3])}")
    read: ModernBertModel = nnx.merge(graph, params)
    return read


def modern_bert_tensors(params: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under the name of Hugging Face: the inverse of `load_modern_bert`."""
    for place, theirs, matrix in _names(params):
        leaf = params
        for part in place:
            leaf = leaf[part]
        value = np.asarray(leaf, np.float32)
        yield theirs, value.T if matrix else value


def _names(params: Any) -> Iterator[tuple[tuple[Any, ...], str, bool]]:
    """Where each parameter lies, what it is called there, and whether it is a transposed matrix."""
    yield ("words", "embedding"), "embeddings.tok_embeddings.weight", False
    yield ("norm", "scale"), "embeddings.norm.weight", False
    for number, layer in params["layers"].items():
        for (part, name), (theirs, matrix) in _LAYER.items():
            if part in layer:
                yield ("layers", number, part, name), f"layers.{number}.{theirs}.weight", matrix
    yield ("final_norm", "scale"), "final_norm.weight", False

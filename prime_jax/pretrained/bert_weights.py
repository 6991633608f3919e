"""The tensors of a BERT folder, by the names of Hugging Face, read into our model."""

import re
from pathlib import Path

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from prime_jax.nn.bert import BertConfig, BertModel
from prime_jax.pretrained.weights import Weights, fill_encoder

_NORM_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def load_bert(folder: Path, config: BertConfig, dtype: DTypeLike = jnp.float32) -> BertModel:
    """Read the weights of a folder into a `BertModel`.

    Tensor names may start with `bert.` or `roberta.`, and leave out `encoder.`; norms may be named gamma and
    beta. Tensors of heads on top (pooler, language model, classifier) are no part of an encoder and not read.

    Raises:
        DataError: If a file or tensor is missing, truncated, or of another shape or dtype than it should be.
    """
    weights = Weights(folder, _plain_name)
    model = nnx.eval_shape(lambda: BertModel(config, dtype=dtype, rngs=nnx.Rngs(0)))
    known = ("embeddings.position_ids",)  # a constant, not a weight
    fill_encoder(model, weights, folder, dtype, belonging=("embeddings.", "encoder.layer."), known=known)
    return model


def _plain_name(stored: str) -> str:
    """One spelling for every variant of a tensor name in use."""
    name = stored.removeprefix("bert.").removeprefix("roberta.")
    name = f"encoder.{name}" if name.startswith("layer.") else name
    return re.sub(r"LayerNorm\.(gamma|beta)$", lambda old: _NORM_NAMES[old[0]], name)

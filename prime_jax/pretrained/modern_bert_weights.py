"""The tensors of a ModernBERT folder, by the names of Hugging Face, read into our model."""

from pathlib import Path

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from prime_jax.nn.modern_bert import ModernBertConfig, ModernBertModel
from prime_jax.pretrained.weights import Weights, fill_encoder


def load_modern_bert(
    folder: Path, config: ModernBertConfig, dtype: DTypeLike = jnp.float32
) -> ModernBertModel:
    """Read the weights of a folder into a `ModernBertModel`; heads on top of it are not read.

    Raises:
        DataError: If a file or tensor is missing, truncated, or of another shape or dtype than it should be.
    """
    weights = Weights(folder, lambda stored: stored.removeprefix("model."))
    model = nnx.eval_shape(lambda: ModernBertModel(config, dtype=dtype, rngs=nnx.Rngs(0)))
    fill_encoder(model, weights, folder, dtype, belonging=("embeddings.", "layers.", "final_norm."))
    return model

"""The folders of text encoders: how each family is configured and read."""

from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from prime_jax import files
from prime_jax.errors import DataError
from prime_jax.nn.bert import BertConfig
from prime_jax.nn.encoders import EncoderConfig, EncoderModel
from prime_jax.nn.modern_bert import ModernBertConfig
from prime_jax.pretrained.bert_weights import load_bert
from prime_jax.pretrained.modern_bert_weights import load_modern_bert


def read_encoder_config(folder: Path) -> EncoderConfig:
    """Read and check `config.json`.

    Raises:
        DataError: If it is missing, or of an encoder this library does not compute; names file and field.
    """
    path = folder / "config.json"
    fields = files.read_json(path, DataError)
    modern = isinstance(fields, dict) and fields.get("model_type") == "modernbert"
    return (ModernBertConfig if modern else BertConfig).parse(fields, str(path))


def load_encoder_model(folder: Path, config: EncoderConfig, dtype: DTypeLike = jnp.float32) -> EncoderModel:
    """The model with the weights of a folder.

    Raises:
        DataError: If a file or tensor is missing, truncated, or of another shape or dtype than it should be.
    """
    if isinstance(config, ModernBertConfig):
        return load_modern_bert(folder, config, dtype)
    return load_bert(folder, config, dtype)

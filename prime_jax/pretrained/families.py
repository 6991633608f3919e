"""The families of text encoders, the one list of them: how each is configured, built, read and written."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from prime_jax import files
from prime_jax.errors import DataError
from prime_jax.nn.bert import BertConfig, BertModel
from prime_jax.nn.modern_bert import ModernBertConfig, ModernBertModel
from prime_jax.pretrained.bert_weights import Tensor, bert_tensors, load_bert
from prime_jax.pretrained.modern_bert_weights import load_modern_bert, modern_bert_tensors

EncoderConfig = BertConfig | ModernBertConfig
EncoderModel = BertModel | ModernBertModel


def read_encoder_config(folder: Path) -> EncoderConfig:
    """Read and check `config.json`.

    Raises:
        DataError: If it is missing, or of an encoder this library does not compute; names file and field.
    """
    path = folder / "config.json"
    fields = files.read_json(path, DataError)
    modern = isinstance(fields, dict) and fields.get("model_type") == "modernbert"
    return (ModernBertConfig if modern else BertConfig).parse(fields, str(path))


def build_encoder(
    config: EncoderConfig, dtype: DTypeLike, *, tf32: bool = False, fused: bool = False
) -> EncoderModel:
    """The model with random weights; `tf32` and `fused` as of its class."""
    if isinstance(config, ModernBertConfig):
        return ModernBertModel(config, dtype=dtype, rngs=nnx.Rngs(0), tf32=tf32, fused=fused)
    return BertModel(config, dtype=dtype, rngs=nnx.Rngs(0), tf32=tf32, fused=fused)


def load_encoder_model(folder: Path, config: EncoderConfig, dtype: DTypeLike = jnp.float32) -> EncoderModel:
    """The model with the weights of a folder.

    Raises:
        DataError: If a file or tensor is missing, truncated, or of another shape or dtype than it should be.
    """
    if isinstance(config, ModernBertConfig):
        return load_modern_bert(folder, config, dtype)
    return load_bert(folder, config, dtype)


def encoder_tensors(folder: Path, params: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters of the folder's model by the names of Hugging Face: the inverse of reading them."""
    modern = isinstance(read_encoder_config(folder), ModernBertConfig)
    return modern_bert_tensors(params) if modern else bert_tensors(params)

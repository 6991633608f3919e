"""The families of text encoders: the one list of them, and how each is built."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from prime_jax.nn.bert import BertConfig, BertModel
from prime_jax.nn.modern_bert import ModernBertConfig, ModernBertModel

EncoderConfig = BertConfig | ModernBertConfig
EncoderModel = BertModel | ModernBertModel


def build_encoder(
    config: EncoderConfig,
    dtype: DTypeLike = jnp.float32,
    *,
    tf32: bool = False,
    fused: bool = False,
    rngs: nnx.Rngs | None = None,
) -> EncoderModel:
    """The model with random weights; `tf32` and `fused` as of its class."""
    rngs = nnx.Rngs(0) if rngs is None else rngs
    if isinstance(config, ModernBertConfig):
        return ModernBertModel(config, dtype=dtype, rngs=rngs, tf32=tf32, fused=fused)
    return BertModel(config, dtype=dtype, rngs=rngs, tf32=tf32, fused=fused)

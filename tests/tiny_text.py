"""A text predictor small enough for tests, of either family of encoders, and sequences for it."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import tiny_bert
from flax import nnx

from prime_jax.data.sequences import Sequences
from prime_jax.models.text import TextConfig, TextPredictor

SEP = 3
MODERN = {
    **{"model_type": "modernbert", "vocab_size": len(tiny_bert.VOCABULARY), "hidden_size": 32},
    **{"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "local_attention": 8},
    **{"max_position_embeddings": 64, "norm_eps": 1e-5, "layer_types": None},
}


def text_config(family: str = "bert", **more: Any) -> TextConfig:
    encoder = dict(tiny_bert.CONFIG)
    if family == "modernbert":
        from transformers import ModernBertConfig

        kept = {name: value for name, value in MODERN.items() if value is not None}
        encoder = ModernBertConfig(**kept, global_attn_every_n_layers=3).to_dict()
    from prime_jax.nn.bert import BertConfig
    from prime_jax.nn.modern_bert import ModernBertConfig as Ours

    parsed = (Ours if family == "modernbert" else BertConfig).parse(encoder, "config.json")
    fields = {"input_dim": 32, "output_dim": 32, "max_tokens": 32, "pooling": "mean", "separator_id": SEP}
    return TextConfig(encoder=parsed, **(fields | more))


def text_model(config: TextConfig, **more: Any) -> TextPredictor:
    """Random weights, larger than those that training starts from, roles too."""
    model = config.build(rngs=nnx.Rngs(0), **more)
    rng = np.random.default_rng(0)
    params = nnx.state(model, nnx.Param)
    for leaf in nnx.to_flat_state(params):
        value = leaf[1][...]
        leaf[1][...] = value + jnp.asarray(0.2 * rng.normal(size=value.shape), jnp.float32)
    nnx.update(model, params)
    return model


def sequences(count: int = 9, seed: int = 0, longest: int = 20) -> Sequences:
    """[CLS], words, and separators here and there."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        words = rng.integers(4, len(tiny_bert.VOCABULARY), rng.integers(1, longest - 1))
        words[1:] = np.where(rng.random(len(words) - 1) < 0.2, SEP, words[1:])
        made.append(np.array([2, *words, SEP], np.int32))
    return Sequences.of(made)

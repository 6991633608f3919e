"""The tensors of a BERT folder, by the names of Hugging Face: read into our model, and given back."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from prime_jax.errors import DataError
from prime_jax.nn.bert import BertConfig, BertModel
from prime_jax.nn.linear import Linear
from prime_jax.pretrained.weights import Weights

Tensor = np.ndarray[Any, np.dtype[Any]]
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

    def fill(parameter: nnx.Param[Array], name: str) -> None:
        parameter.set_value(jnp.asarray(weights.take(name, parameter.shape)))

    def fill_norm(norm: nnx.LayerNorm, name: str) -> None:
        assert norm.scale is not None
        assert norm.bias is not None
        fill(norm.scale, f"{name}.weight")
        fill(norm.bias, f"{name}.bias")

    def fill_linear(linear: Linear, *names: str) -> None:
        """One linear map of the file, or several side by side."""
        inputs, outputs = linear.kernel.shape
        part = outputs // len(names)
        kernels = [weights.take(f"{name}.weight", (part, inputs)).T for name in names]
        biases = [weights.take(f"{name}.bias", (part,)) for name in names]
        linear.kernel.set_value(jnp.asarray(np.concatenate(kernels, axis=1), dtype))
        linear.bias.set_value(jnp.asarray(np.concatenate(biases)))

    fill(model.words.embedding, "embeddings.word_embeddings.weight")
    fill(model.positions.embedding, "embeddings.position_embeddings.weight")
    fill(model.types.embedding, "embeddings.token_type_embeddings.weight")
    fill_norm(model.norm, "embeddings.LayerNorm")
    for number, layer in enumerate(model.layers):
        prefix = f"layer.{number}"
        fill_linear(layer.qkv, *(f"{prefix}.attention.self.{part}" for part in ("query", "key", "value")))
        fill_linear(layer.attention_out, f"{prefix}.attention.output.dense")
        fill_norm(layer.attention_norm, f"{prefix}.attention.output.LayerNorm")
        fill_linear(layer.mlp_in, f"{prefix}.intermediate.dense")
        fill_linear(layer.mlp_out, f"{prefix}.output.dense")
        fill_norm(layer.mlp_norm, f"{prefix}.output.LayerNorm")
    unread = [name for name in weights.unread() if name.startswith(("embeddings.", "layer."))]
    unread = [name for name in unread if name != "embeddings.position_ids"]  # a constant, not a weight
    if unread:
        raise DataError(f"{folder}: config.json has no place for the tensors {', '.join(unread[:3])}")
    return model


def _plain_name(stored: str) -> str:
    """One spelling for every variant of a tensor name in use."""
    name = stored.removeprefix("bert.").removeprefix("roberta.").removeprefix("encoder.")
    return re.sub(r"LayerNorm\.(gamma|beta)$", lambda old: _NORM_NAMES[old[0]], name)


def bert_tensors(params: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under the name of Hugging Face: the inverse of `load_bert`."""
    yield "embeddings.word_embeddings.weight", np.asarray(params["words"]["embedding"])
    yield "embeddings.position_embeddings.weight", np.asarray(params["positions"]["embedding"])
    yield "embeddings.token_type_embeddings.weight", np.asarray(params["types"]["embedding"])
    yield from _norm("embeddings.LayerNorm", params["norm"])
    for number, layer in params["layers"].items():
        prefix = f"encoder.layer.{number}"
        kernels = np.split(np.asarray(layer["qkv"]["kernel"], np.float32), 3, axis=1)
        biases = np.split(np.asarray(layer["qkv"]["bias"]), 3)
        for part, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True):
            yield from _linear(f"{prefix}.attention.self.{part}", {"kernel": kernel, "bias": bias})
        yield from _linear(f"{prefix}.attention.output.dense", layer["attention_out"])
        yield from _norm(f"{prefix}.attention.output.LayerNorm", layer["attention_norm"])
        yield from _linear(f"{prefix}.intermediate.dense", layer["mlp_in"])
        yield from _linear(f"{prefix}.output.dense", layer["mlp_out"])
        yield from _norm(f"{prefix}.output.LayerNorm", layer["mlp_norm"])


def _linear(name: str, linear: Any) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", np.asarray(linear["kernel"], np.float32).T
    yield f"{name}.bias", np.asarray(linear["bias"])


def _norm(name: str, norm: Any) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", np.asarray(norm["scale"])
    yield f"{name}.bias", np.asarray(norm["bias"])

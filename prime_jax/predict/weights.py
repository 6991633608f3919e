"""A predictor's weights laid out once for predicting.

Training keeps one fused input projection per layer and float32 matrices `[I, O]`. For predicting, the last
layer's projection is split, since only [PRED] asks there, and matrices may be bfloat16. XLA's bfloat16
products on CPUs read `[O, I]` matrices faster than `[I, O]` ones, and float32 products the
other way round.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from prime_jax.models.prime import EmbeddingPredictor
from prime_jax.nn.linear import Linear

DType = Literal["float32", "bfloat16"]


@struct.dataclass
class Affine:
    """An affine map: kernel `[I, O]`, or `[O, I]` where `outputs_first`, and bias `[O]`."""

    kernel: Any  # Array, or what JAX puts in its place when it describes a program
    bias: Any
    outputs_first: bool = struct.field(pytree_node=False)


class Norm(NamedTuple):
    """LayerNorm's parameters, `[H]` each."""

    scale: Array
    bias: Array


class Layer(NamedTuple):
    """One transformer block.

    Attributes:
        norm1: Before attention.
        in_proj: To queries, keys and values, 3 H wide; in the last layer to keys and values, 2 H wide.
        query: To queries, in the last layer only.
        out_proj: After attention.
        norm2: Before the MLP.
        mlp_in: H to 4 H.
        mlp_out: 4 H to H.
    """

    norm1: Norm
    in_proj: Affine
    query: Affine | None
    out_proj: Affine
    norm2: Norm
    mlp_in: Affine
    mlp_out: Affine


class Residual(NamedTuple):
    """Parameters of what a prediction is added to; `age` and `content` with residual 'copy' only."""

    gate: Array
    age: Array | None
    content: Array | None


class Weights(NamedTuple):
    """Everything a forward pass reads."""

    context_proj: Affine
    query_proj: Affine
    output_proj: Affine
    pred_token: Float[Array, " H"]
    pos_embedding: Float[Array, "positions H"]
    layers: tuple[Layer, ...]
    norm: Norm
    residual: Residual | None


def lay_out(model: EmbeddingPredictor, dtype: DType) -> Weights:
    """The weights of `model`, matrices in `dtype`, everything else float32.

    In float32 all but the last layer's input projection are the model's own arrays, not copies.
    """
    last = len(model.layers) - 1
    layers = []
    for index, block in enumerate(model.layers):
        fused, hidden = block.attention.in_proj, model.config.hidden_dim
        query = None
        in_proj = _linear(fused, dtype)
        if index == last:
            kernel, bias = fused.kernel[...], fused.bias[...]
            query = _affine(kernel[:, :hidden], bias[:hidden], dtype)
            in_proj = _affine(kernel[:, hidden:], bias[hidden:], dtype)
        layers.append(
            Layer(
                _norm(block.norm1),
                in_proj,
                query,
                _linear(block.attention.out_proj, dtype),
                _norm(block.norm2),
                _linear(block.mlp_in, dtype),
                _linear(block.mlp_out, dtype),
            )
        )
    return Weights(
        context_proj=_linear(model.context_proj, dtype),
        query_proj=_linear(model.query_proj, dtype),
        output_proj=_linear(model.output_proj, dtype),
        pred_token=model.pred_token[...],
        pos_embedding=model.pos_embedding[...],
        layers=tuple(layers),
        norm=_norm(model.norm),
        residual=_residual(model),
    )


def _residual(model: EmbeddingPredictor) -> Residual | None:
    if model.config.residual == "none":
        return None
    copies = model.config.residual == "copy"
    return Residual(
        gate=model.residual_gate[...],
        age=model.copy_age[...] if copies else None,
        content=model.copy_content[...] if copies else None,
    )


def _linear(linear: Linear, dtype: DType) -> Affine:
    return _affine(linear.kernel[...], linear.bias[...], dtype)


def _affine(kernel: Array, bias: Array, dtype: DTypeLike) -> Affine:
    kernel = jnp.asarray(kernel, dtype)
    outputs_first = dtype == "bfloat16" and jax.default_backend() == "cpu"
    return Affine(kernel.T if outputs_first else kernel, bias, outputs_first)


def _norm(norm: nnx.LayerNorm) -> Norm:
    scale, bias = norm.scale, norm.bias
    assert scale is not None
    assert bias is not None
    return Norm(scale[...], bias[...])

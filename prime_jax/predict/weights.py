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

from prime_jax.models.prime import Block, EmbeddingPredictor
from prime_jax.nn.linear import Linear
from prime_jax.nn.llama import LlamaBlock, RMSNorm

DType = Literal["float32", "bfloat16"]


@struct.dataclass
class Affine:
    """An affine map: kernel `[I, O]`, or `[O, I]` where `outputs_first`, and bias `[O]` or None."""

    kernel: Any  # Array, or what JAX puts in its place when it describes a program
    bias: Any
    outputs_first: bool = struct.field(pytree_node=False)


class Norm(NamedTuple):
    """LayerNorm's parameters, `[H]` each, or RMSNorm's, which has no bias."""

    scale: Array
    bias: Array | None


class Layer(NamedTuple):
    """One transformer block.

    Attributes:
        norm1: Before attention.
        in_proj: To queries, keys and values side by side; in the last layer to keys and values only.
        query: To queries, in the last layer only.
        out_proj: After attention.
        norm2: Before the MLP.
        mlp_in: H to the MLP's width.
        mlp_out: Back to H.
        mlp_gate: What SwiGLU multiplies `mlp_in` by; None where the MLP is a GELU's.
    """

    norm1: Norm
    in_proj: Affine
    query: Affine | None
    out_proj: Affine
    norm2: Norm
    mlp_in: Affine
    mlp_out: Affine
    mlp_gate: Affine | None = None


class Residual(NamedTuple):
    """Parameters of what a prediction is added to.

    Attributes:
        gate: Of the transformer's answer.
        age: Weights of turns by age; residual 'copy' and 'linear' only.
        content: Weights of turns by content, likewise.
        linear: Map of the query and the mixed turns; residual 'linear' only.
    """

    gate: Array
    age: Array | None
    content: Array | None
    linear: Affine | None = None


class Weights(NamedTuple):
    """Everything a forward pass reads."""

    context_proj: Affine
    query_proj: Affine
    output_proj: Affine
    pred_token: Float[Array, " H"]
    pos_embedding: Float[Array, "positions H"] | None  # llama layers rotate instead
    layers: tuple[Layer, ...]
    norm: Norm
    residual: Residual | None


def lay_out(model: EmbeddingPredictor, dtype: DType) -> Weights:
    """The weights of `model`, matrices in `dtype`, everything else float32.

    In float32 all but the last layer's input projection are the model's own arrays, not copies.
    """
    last = len(model.layers) - 1
    layers = tuple(_layer(block, dtype, last=index == last) for index, block in enumerate(model.layers))
    return Weights(
        context_proj=_linear(model.context_proj, dtype),
        query_proj=_linear(model.query_proj, dtype),
        output_proj=_linear(model.output_proj, dtype),
        pred_token=model.pred_token[...],
        pos_embedding=model.pos_embedding[...] if hasattr(model, "pos_embedding") else None,
        layers=layers,
        norm=_norm(model.norm),
        residual=_residual(model, dtype),
    )


def _layer(block: Block, dtype: DType, *, last: bool) -> Layer:
    if isinstance(block, LlamaBlock):
        return _llama_layer(block, dtype, last=last)
    fused = block.attention.in_proj
    query, in_proj = None, _linear(fused, dtype)
    if last:
        kernel, bias, hidden = fused.kernel[...], fused.bias[...], block.attention.hidden_dim
        query = _affine(kernel[:, :hidden], bias[:hidden], dtype)
        in_proj = _affine(kernel[:, hidden:], bias[hidden:], dtype)
    return Layer(
        _norm(block.norm1),
        in_proj,
        query,
        _linear(block.attention.out_proj, dtype),
        _norm(block.norm2),
        _linear(block.mlp_in, dtype),
        _linear(block.mlp_out, dtype),
    )


def _llama_layer(block: LlamaBlock, dtype: DType, *, last: bool) -> Layer:
    """Queries, keys and values side by side; queries apart in the last layer, where [PRED] alone asks."""
    queries, keys, values = (part.kernel[...] for part in (block.q_proj, block.k_proj, block.v_proj))
    asked = [keys, values] if last else [queries, keys, values]
    return Layer(
        _norm(block.norm1),
        _affine(jnp.concatenate(asked, axis=1), None, dtype),
        _affine(queries, None, dtype) if last else None,
        _affine(block.o_proj.kernel[...], None, dtype),
        _norm(block.norm2),
        _affine(block.up_proj.kernel[...], None, dtype),
        _affine(block.down_proj.kernel[...], None, dtype),
        _affine(block.gate_proj.kernel[...], None, dtype),
    )


def _residual(model: EmbeddingPredictor, dtype: DType) -> Residual | None:
    if model.config.residual == "none":
        return None
    copies = model.config.copies_turns
    return Residual(
        gate=model.residual_gate[...],
        age=model.copy_age[...] if copies else None,
        content=model.copy_content[...] if copies else None,
        linear=_linear(model.linear_map, dtype) if model.config.residual == "linear" else None,
    )


def _linear(linear: Linear, dtype: DType) -> Affine:
    return _affine(linear.kernel[...], linear.bias[...], dtype)


def _affine(kernel: Array, bias: Array | None, dtype: DTypeLike) -> Affine:
    kernel = jnp.asarray(kernel, dtype)
    outputs_first = dtype == "bfloat16" and jax.default_backend() == "cpu"
    return Affine(kernel.T if outputs_first else kernel, bias, outputs_first)


def _norm(norm: nnx.LayerNorm | RMSNorm) -> Norm:
    scale = norm.scale
    assert scale is not None
    if isinstance(norm, RMSNorm):
        return Norm(scale[...], None)
    assert norm.bias is not None
    return Norm(scale[...], norm.bias[...])

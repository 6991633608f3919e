"""A predictor's weights laid out once for predicting.

Training keeps one fused input projection per layer and float32 matrices `[I, O]`. For predicting, the last
layer's projection is split, since only [PRED] asks there, and matrices may be bfloat16. XLA's bfloat16
products on CPUs read `[O, I]` matrices faster than `[I, O]` ones; which way float32 products are faster
depends on the processor, so `precision.transposed_pays` measures it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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


@dataclass(frozen=True, eq=False)
class _Later:
    """An array that still has to be made of the model's own; all of them are made in one program."""

    make: Callable[..., Array]
    of: tuple[Array, ...]


Compile = Callable[..., Callable[..., Any]]
MakeAffine = Callable[..., Affine]
WHOLE = slice(None)


def lay_out(
    model: EmbeddingPredictor,
    dtype: DType,
    *,
    outputs_first: bool | None = None,
    compile_with: Compile | None = None,
) -> Weights:
    """The weights of `model`, matrices in `dtype`, everything else float32.

    In float32, not transposed, all but the last layer's input projection are the model's own arrays, not
    copies.

    Args:
        model: Whose weights.
        dtype: Of the matrices.
        outputs_first: Whether matrices lie `[O, I]`; None means in bfloat16 on CPUs only.
        compile_with: `compile_with(function, *arrays)` compiles the one program that makes copies; None
            means `jax.jit`.
    """
    if outputs_first is None:
        outputs_first = dtype == "bfloat16" and jax.default_backend() == "cpu"
    weights: Weights = made(_described(model, dtype, outputs_first), compile_with)
    return weights


def made(described: Any, compile_with: Compile | None) -> Any:
    """The tree with every `_Later` made, all in one program, since compiling each takes its time."""
    leaves, structure = jax.tree.flatten(described)
    later = [leaf for leaf in leaves if isinstance(leaf, _Later)]
    if later:
        arguments = [leaf.of for leaf in later]

        def make(arguments: Sequence[tuple[Array, ...]]) -> list[Array]:
            return [leaf.make(*arrays) for leaf, arrays in zip(later, arguments, strict=True)]

        program = jax.jit(make) if compile_with is None else compile_with(make, arguments)
        ready = iter(program(arguments))
        leaves = [next(ready) if isinstance(leaf, _Later) else leaf for leaf in leaves]
    return jax.tree.unflatten(structure, leaves)


def _described(model: EmbeddingPredictor, dtype: DType, outputs_first: bool) -> Weights:
    last = len(model.layers) - 1
    affine = partial(_affine, dtype=dtype, outputs_first=outputs_first)
    layers = tuple(_layer(block, affine, last=index == last) for index, block in enumerate(model.layers))
    return Weights(
        context_proj=_linear(model.context_proj, affine),
        query_proj=_linear(model.query_proj, affine),
        output_proj=_linear(model.output_proj, affine),
        pred_token=model.pred_token[...],
        pos_embedding=model.pos_embedding[...] if hasattr(model, "pos_embedding") else None,
        layers=layers,
        norm=_norm(model.norm),
        residual=_residual(model, affine),
    )


def _layer(block: Block, affine: MakeAffine, *, last: bool) -> Layer:
    if isinstance(block, LlamaBlock):
        return _llama_layer(block, affine, last=last)
    fused = block.attention.in_proj
    query, in_proj = None, _linear(fused, affine)
    if last:
        hidden = block.attention.hidden_dim
        query = affine((fused.kernel[...],), fused.bias[...], columns=slice(None, hidden))
        in_proj = affine((fused.kernel[...],), fused.bias[...], columns=slice(hidden, None))
    return Layer(
        _norm(block.norm1),
        in_proj,
        query,
        _linear(block.attention.out_proj, affine),
        _norm(block.norm2),
        _linear(block.mlp_in, affine),
        _linear(block.mlp_out, affine),
    )


def _llama_layer(block: LlamaBlock, affine: MakeAffine, *, last: bool) -> Layer:
    """Queries, keys and values side by side; queries apart in the last layer, where [PRED] alone asks."""
    queries, keys, values = (part.kernel[...] for part in (block.q_proj, block.k_proj, block.v_proj))
    asked = (keys, values) if last else (queries, keys, values)
    return Layer(
        _norm(block.norm1),
        affine(asked, None),
        affine((queries,), None) if last else None,
        affine((block.o_proj.kernel[...],), None),
        _norm(block.norm2),
        affine((block.up_proj.kernel[...],), None),
        affine((block.down_proj.kernel[...],), None),
        affine((block.gate_proj.kernel[...],), None),
    )


def _residual(model: EmbeddingPredictor, affine: MakeAffine) -> Residual | None:
    if model.config.residual == "none":
        return None
    copies = model.config.copies_turns
    return Residual(
        gate=model.residual_gate[...],
        age=model.copy_age[...] if copies else None,
        content=model.copy_content[...] if copies else None,
        linear=_linear(model.linear_map, affine) if model.config.residual == "linear" else None,
    )


def _linear(linear: Linear, affine: MakeAffine) -> Affine:
    return affine((linear.kernel[...],), linear.bias[...])


def _affine(
    kernels: tuple[Array, ...],
    bias: Array | None,
    *,
    dtype: DTypeLike,
    outputs_first: bool,
    columns: slice = WHOLE,
) -> Affine:
    """Kernels `[I, O]` side by side, or some columns of them, with their bias."""
    kernel: Any = kernels[0]
    if len(kernels) > 1 or columns != WHOLE or outputs_first or kernel.dtype != dtype:
        kernel = _Later(partial(_kernel, dtype=dtype, outputs_first=outputs_first, columns=columns), kernels)
    held: Any = bias
    if bias is not None and columns != WHOLE:
        held = _Later(lambda bias: bias[columns], (bias,))
    return Affine(kernel, held, outputs_first)


def _kernel(*kernels: Array, dtype: DTypeLike, outputs_first: bool, columns: slice) -> Array:
    joined = jnp.concatenate(kernels, axis=1) if len(kernels) > 1 else kernels[0]
    kernel = joined[:, columns].astype(dtype)
    return kernel.T if outputs_first else kernel


def _norm(norm: nnx.LayerNorm | RMSNorm) -> Norm:
    scale = norm.scale
    assert scale is not None
    if isinstance(norm, RMSNorm):
        return Norm(scale[...], None)
    assert norm.bias is not None
    return Norm(scale[...], norm.bias[...])

"""A model's weights as a flat dictionary with the names and layouts of a PyTorch module.

PRIME's names are the plan's and load with `strict=True` into a plain `torch.nn` model; a residual adds some
of its own. Llama layers have the names that they have in a Hugging Face folder. JASPER's are those of
the module in `prime_jax.export.torch_jasper`.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from prime_jax.errors import CheckpointError
from prime_jax.models import Model, ModelConfig
from prime_jax.models.jasper import JasperPredictor
from prime_jax.models.prime import EmbeddingPredictor
from prime_jax.models.subspace import CENTROIDS, DecomposedJasperPredictor
from prime_jax.nn.blocks import PredictorTransformerBlock
from prime_jax.nn.linear import Linear
from prime_jax.nn.llama import LlamaBlock, RMSNorm
from prime_jax.nn.mlp import MLP

Tensor = np.ndarray[Any, np.dtype[Any]]


class _Slot(NamedTuple):
    """Where one tensor lives in the model, and how the two layouts differ."""

    name: str
    param: Any  # nnx.Param
    transposed: bool = False  # torch keeps matrices [O, I], we [I, O]
    leading: int = 0  # axes of length one that torch has in front

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the dictionary."""
        own = tuple(self.param.shape)
        return (1,) * self.leading + (own[::-1] if self.transposed else own)

    def to_torch(self) -> Tensor:
        """A contiguous float32 copy in torch's layout."""
        value = np.asarray(self.param[...], dtype=np.float32)
        return np.array(value.T if self.transposed else value, order="C").reshape(self.shape)

    def from_torch(self, tensor: Tensor) -> None:
        """Put a tensor of torch's layout into the model."""
        own = tensor.T if self.transposed else tensor
        self.param.set_value(jnp.array(own.reshape(self.param.shape)))


def state_dict(model: Model) -> dict[str, Tensor]:
    """The weights by name, float32, in torch's layout (`[out, in]` matrices).

    A config with a residual adds `residual_gate`, the residuals 'copy' and 'linear' also `copy_age` and
    `copy_content`, and 'linear' the map of query and mixed turns, `linear_map`.
    """
    return {slot.name: slot.to_torch() for slot in _slots(model)}


def load_state_dict(config: ModelConfig, tensors: Mapping[str, Tensor]) -> Model:
    """The model whose `state_dict` this is.

    Args:
        config: Shape and behaviour of the model.
        tensors: Exactly the tensors `state_dict` gives for such a model.

    Raises:
        CheckpointError: If a name is missing or unexpected, or a tensor has another shape, is not float32,
            or holds NaN or Inf. The message names the tensor.
    """
    model: Model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    slots = {slot.name: slot for slot in _slots(model)}
    for name in sorted(tensors.keys() - slots.keys()):
        raise CheckpointError(f"tensor {name!r} is unexpected: a model of this config has no such weights")
    for name, slot in slots.items():
        if name not in tensors:
            raise CheckpointError(f"tensor {name!r} is missing")
        _check(slot, tensors[name])
        slot.from_torch(tensors[name])
    return model


def _check(slot: _Slot, tensor: Tensor) -> None:
    if tensor.dtype != np.float32:
        raise CheckpointError(f"tensor {slot.name!r} has dtype {tensor.dtype}, expected float32")
    if tensor.shape != slot.shape:
        raise CheckpointError(f"tensor {slot.name!r} has shape {tensor.shape}, expected {slot.shape}")
    if not np.isfinite(tensor).all():
        raise CheckpointError(f"tensor {slot.name!r} holds NaN or Inf")


def _slots(model: Model) -> Iterator[_Slot]:
    """Every tensor: the one table that both directions read."""
    return _of_prime(model) if isinstance(model, EmbeddingPredictor) else _of_jasper(model)


def _of_prime(model: EmbeddingPredictor) -> Iterator[_Slot]:
    yield _Slot("pred_token", model.pred_token, leading=2)
    if hasattr(model, "pos_embedding"):
        yield _Slot("pos_embedding", model.pos_embedding, leading=1)
    for name in ("context_proj", "query_proj", "output_proj"):
        yield from _linear(name, getattr(model, name))
    for index, layer in enumerate(model.layers):
        if isinstance(layer, LlamaBlock):
            yield from _llama_block(f"layers.{index}", layer)
        else:
            yield from _block(f"layers.{index}", layer)
    yield from _norm("norm", model.norm)
    for name in ("residual_gate", "copy_age", "copy_content"):
        if hasattr(model, name):
            yield _Slot(name, getattr(model, name))
    if hasattr(model, "linear_map"):
        yield from _linear("linear_map", model.linear_map)


def _of_jasper(model: JasperPredictor | DecomposedJasperPredictor) -> Iterator[_Slot]:
    stacks = {name: getattr(model, name) for name in ("question_encoder", "steering_encoder", "head")}
    if isinstance(model, DecomposedJasperPredictor):
        stacks |= {"coarse_encoder": model.coarse_encoder, "router.body": model.router.body}
        yield from _linear("router.choice", model.router.choice)
        yield _Slot(CENTROIDS, model.centroids)
    for name, stack in stacks.items():
        yield from _mlp(name, stack)
    yield from _linear("output_proj", model.output_proj)
    for name in ("residual_gate", "coarse_gate"):
        if hasattr(model, name):
            yield _Slot(name, getattr(model, name))


def _mlp(name: str, stack: MLP) -> Iterator[_Slot]:
    for index, (linear, norm) in enumerate(zip(stack.linears, stack.norms, strict=True)):
        yield from _linear(f"{name}.linears.{index}", linear)
        yield from _norm(f"{name}.norms.{index}", norm)


def _block(name: str, layer: PredictorTransformerBlock) -> Iterator[_Slot]:
    fused = layer.attention.in_proj  # MultiheadAttention names it with an underscore, not a dot
    yield _Slot(f"{name}.attention.in_proj_weight", fused.kernel, transposed=True)
    yield _Slot(f"{name}.attention.in_proj_bias", fused.bias)
    yield from _linear(f"{name}.attention.out_proj", layer.attention.out_proj)
    yield from _linear(f"{name}.mlp.0", layer.mlp_in)
    yield from _linear(f"{name}.mlp.3", layer.mlp_out)
    yield from _norm(f"{name}.norm1", layer.norm1)
    yield from _norm(f"{name}.norm2", layer.norm2)


def _llama_block(name: str, layer: LlamaBlock) -> Iterator[_Slot]:
    """The names of a Hugging Face Llama."""
    yield from _norm(f"{name}.input_layernorm", layer.norm1)
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield _Slot(f"{name}.self_attn.{part}.weight", getattr(layer, part).kernel, transposed=True)
    yield from _norm(f"{name}.post_attention_layernorm", layer.norm2)
    for part in ("gate_proj", "up_proj", "down_proj"):
        yield _Slot(f"{name}.mlp.{part}.weight", getattr(layer, part).kernel, transposed=True)


def _linear(name: str, linear: Linear) -> Iterator[_Slot]:
    yield _Slot(f"{name}.weight", linear.kernel, transposed=True)
    yield _Slot(f"{name}.bias", linear.bias)


def _norm(name: str, norm: nnx.LayerNorm | RMSNorm) -> Iterator[_Slot]:
    yield _Slot(f"{name}.weight", norm.scale)
    if isinstance(norm, nnx.LayerNorm):
        yield _Slot(f"{name}.bias", norm.bias)

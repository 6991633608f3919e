"""A model's weights as a flat dictionary with the names and layouts of a PyTorch module.

PRIME's names are the plan's and load with `strict=True` into a plain `torch.nn` model; a residual adds some
of its own. Llama layers and the encoder of a text predictor have the names that they have in a Hugging Face
folder. JASPER's are those of the module in `prime_jax.export.torch_jasper`.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from flax import nnx

from prime_jax.errors import CheckpointError
from prime_jax.models import Model, ModelConfig
from prime_jax.models.jasper import JasperPredictor
from prime_jax.models.mix import MixPredictor
from prime_jax.models.prime import EmbeddingPredictor
from prime_jax.models.subspace import CENTROIDS, DecomposedJasperPredictor
from prime_jax.models.text import TextPredictor
from prime_jax.nn.blocks import PredictorTransformerBlock
from prime_jax.nn.llama import LlamaBlock
from prime_jax.nn.mlp import MLP
from prime_jax.nn.torch_layout import Slot, Tensor, encoder_slots, linear_slots, norm_slots


def state_dict(model: Model) -> dict[str, Tensor]:
    """The weights by name, float32, in torch's layout (`[out, in]` matrices).

    A config with a residual adds `residual_gate`, the residuals 'copy' and 'linear' also `copy_age` and
    `copy_content`, and 'linear' the map of query and mixed turns, `linear_map`.
    """
    return {name: tensor for slot in _slots(model) for name, tensor in slot.tensors()}


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
    slots = list(_slots(model))
    shapes = {name: slot.shape for slot in slots for name in slot.names}
    for name in sorted(tensors.keys() - shapes.keys()):
        raise CheckpointError(f"tensor {name!r} is unexpected: a model of this config has no such weights")
    for name, shape in shapes.items():
        if name not in tensors:
            raise CheckpointError(f"tensor {name!r} is missing")
        _check(name, tensors[name], shape)
    for slot in slots:
        slot.fill(lambda name: tensors[name])
    return model


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != np.float32:
        raise CheckpointError(f"tensor {name!r} has dtype {tensor.dtype}, expected float32")
    if tensor.shape != shape:
        raise CheckpointError(f"tensor {name!r} has shape {tensor.shape}, expected {shape}")
    if not np.isfinite(tensor).all():
        raise CheckpointError(f"tensor {name!r} holds NaN or Inf")


def _slots(model: Model) -> Iterator[Slot]:
    """Every tensor: the one table that both directions read."""
    if isinstance(model, TextPredictor):
        return _of_text(model)
    if isinstance(model, MixPredictor):
        return _of_mix(model)
    return _of_prime(model) if isinstance(model, EmbeddingPredictor) else _of_jasper(model)


def _of_text(model: TextPredictor) -> Iterator[Slot]:
    yield from encoder_slots(model.encoder)
    if model.config.roles:
        yield Slot(("roles",), model.roles)


def _of_mix(model: MixPredictor) -> Iterator[Slot]:
    yield Slot(("turn_weights",), model.turn_weights)
    if hasattr(model, "linear_map"):
        yield from linear_slots(model.linear_map, "linear_map")


def _of_prime(model: EmbeddingPredictor) -> Iterator[Slot]:
    yield Slot(("pred_token",), model.pred_token, leading=2)
    if hasattr(model, "pos_embedding"):
        yield Slot(("pos_embedding",), model.pos_embedding, leading=1)
    for name in ("context_proj", "query_proj", "output_proj"):
        yield from linear_slots(getattr(model, name), name)
    for index, layer in enumerate(model.layers):
        if isinstance(layer, LlamaBlock):
            yield from _llama_block(f"layers.{index}", layer)
        else:
            yield from _block(f"layers.{index}", layer)
    yield from norm_slots(model.norm, "norm")
    for name in ("residual_gate", "copy_age", "copy_content"):
        if hasattr(model, name):
            yield Slot((name,), getattr(model, name))
    if hasattr(model, "linear_map"):
        yield from linear_slots(model.linear_map, "linear_map")


def _of_jasper(model: JasperPredictor | DecomposedJasperPredictor) -> Iterator[Slot]:
    stacks = {name: getattr(model, name) for name in ("question_encoder", "steering_encoder", "head")}
    if isinstance(model, DecomposedJasperPredictor):
        stacks |= {"coarse_encoder": model.coarse_encoder, "router.body": model.router.body}
        yield from linear_slots(model.router.choice, "router.choice")
        yield Slot((CENTROIDS,), model.centroids)
    for name, stack in stacks.items():
        yield from _mlp(name, stack)
    yield from linear_slots(model.output_proj, "output_proj")
    for name in ("residual_gate", "coarse_gate"):
        if hasattr(model, name):
            yield Slot((name,), getattr(model, name))


def _mlp(name: str, stack: MLP) -> Iterator[Slot]:
    for index, (linear, norm) in enumerate(zip(stack.linears, stack.norms, strict=True)):
        yield from linear_slots(linear, f"{name}.linears.{index}")
        yield from norm_slots(norm, f"{name}.norms.{index}")


def _block(name: str, layer: PredictorTransformerBlock) -> Iterator[Slot]:
    fused = layer.attention.in_proj  # MultiheadAttention names it with an underscore, not a dot
    yield Slot((f"{name}.attention.in_proj_weight",), fused.kernel, transposed=True)
    yield Slot((f"{name}.attention.in_proj_bias",), fused.bias)
    yield from linear_slots(layer.attention.out_proj, f"{name}.attention.out_proj")
    yield from linear_slots(layer.mlp_in, f"{name}.mlp.0")
    yield from linear_slots(layer.mlp_out, f"{name}.mlp.3")
    yield from norm_slots(layer.norm1, f"{name}.norm1")
    yield from norm_slots(layer.norm2, f"{name}.norm2")


def _llama_block(name: str, layer: LlamaBlock) -> Iterator[Slot]:
    """The names of a Hugging Face Llama."""
    yield from norm_slots(layer.norm1, f"{name}.input_layernorm")
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield Slot((f"{name}.self_attn.{part}.weight",), getattr(layer, part).kernel, transposed=True)
    yield from norm_slots(layer.norm2, f"{name}.post_attention_layernorm")
    for part in ("gate_proj", "up_proj", "down_proj"):
        yield Slot((f"{name}.mlp.{part}.weight",), getattr(layer, part).kernel, transposed=True)

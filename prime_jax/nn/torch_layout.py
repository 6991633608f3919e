"""Parameters under the names and in the layouts that they have in PyTorch: one table for both directions."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from prime_jax.nn.bert import BertModel
from prime_jax.nn.encoders import EncoderModel
from prime_jax.nn.linear import Linear
from prime_jax.nn.modern_bert import ModernBertModel

Tensor = np.ndarray[Any, np.dtype[Any]]


class Slot(NamedTuple):
    """Where one parameter lives in a model, and how the two layouts differ.

    Attributes:
        names: Of its tensor in PyTorch; or of several that lie side by side on our last axis.
        param: The `nnx.Param`.
        transposed: Whether it is a matrix, which torch keeps `[O, I]` and we `[I, O]`.
        leading: How many axes of length one torch has in front.
    """

    names: tuple[str, ...]
    param: Any
    transposed: bool = False
    leading: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of each tensor in PyTorch."""
        own = tuple(self.param.shape)
        if len(self.names) > 1:
            own = (*own[:-1], own[-1] // len(self.names))
        return (1,) * self.leading + (own[::-1] if self.transposed else own)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor by its name: a contiguous float32 copy in torch's layout."""
        value = np.asarray(self.param[...], dtype=np.float32)
        parts = np.split(value, len(self.names), axis=-1) if len(self.names) > 1 else [value]
        for name, part in zip(self.names, parts, strict=True):
            own = part.T if self.transposed else part
            yield name, np.array(own, order="C").reshape(self.shape)

    def fill(self, take: Callable[[str], Tensor], dtype: DTypeLike = jnp.float32) -> None:
        """Put tensors of torch's layout, as `take` gives them by name, into the model."""
        given = (take(name) for name in self.names)
        parts = [tensor.T if self.transposed else tensor for tensor in given]
        whole = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
        self.param.set_value(jnp.array(whole.reshape(self.param.shape), dtype))


def linear_slots(linear: Linear, *names: str) -> Iterator[Slot]:
    """Matrix and bias of an affine map, or of several that ours has side by side."""
    yield Slot(tuple(f"{name}.weight" for name in names), linear.kernel, transposed=True)
    yield Slot(tuple(f"{name}.bias" for name in names), linear.bias)


def norm_slots(norm: Any, name: str) -> Iterator[Slot]:
    """Scale of a norm, and its bias where it has one."""
    yield Slot((f"{name}.weight",), norm.scale)
    if isinstance(norm, nnx.LayerNorm):
        yield Slot((f"{name}.bias",), norm.bias)


def encoder_slots(model: EncoderModel) -> Iterator[Slot]:
    """Every parameter of a text encoder under the names that `transformers.AutoModel` reads."""
    return _modern_bert(model) if isinstance(model, ModernBertModel) else _bert(model)


def tensors_of(model: EncoderModel) -> dict[str, Tensor]:
    """Every tensor of a text encoder under these names, float32."""
    return {name: tensor for slot in encoder_slots(model) for name, tensor in slot.tensors()}


def _bert(model: BertModel) -> Iterator[Slot]:
    tables = {"word": model.words, "position": model.positions, "token_type": model.types}
    for name, table in tables.items():
        yield Slot((f"embeddings.{name}_embeddings.weight",), table.embedding)
    yield from norm_slots(model.norm, "embeddings.LayerNorm")
    for number, layer in enumerate(model.layers):
        prefix = f"encoder.layer.{number}"
        parts = (f"{prefix}.attention.self.{part}" for part in ("query", "key", "value"))
        yield from linear_slots(layer.qkv, *parts)
        yield from linear_slots(layer.attention_out, f"{prefix}.attention.output.dense")
        yield from norm_slots(layer.attention_norm, f"{prefix}.attention.output.LayerNorm")
        yield from linear_slots(layer.mlp_in, f"{prefix}.intermediate.dense")
        yield from linear_slots(layer.mlp_out, f"{prefix}.output.dense")
        yield from norm_slots(layer.mlp_norm, f"{prefix}.output.LayerNorm")


def _modern_bert(model: ModernBertModel) -> Iterator[Slot]:
    yield Slot(("embeddings.tok_embeddings.weight",), model.words.embedding)
    yield from norm_slots(model.norm, "embeddings.norm")
    for number, layer in enumerate(model.layers):
        prefix = f"layers.{number}"
        if not layer.first:  # the embeddings' norm stands before the first one
            yield from norm_slots(layer.attention_norm, f"{prefix}.attn_norm")
        yield Slot((f"{prefix}.attn.Wqkv.weight",), layer.qkv.kernel, transposed=True)
        yield Slot((f"{prefix}.attn.Wo.weight",), layer.attention_out.kernel, transposed=True)
        yield from norm_slots(layer.mlp_norm, f"{prefix}.mlp_norm")
        yield Slot((f"{prefix}.mlp.Wi.weight",), layer.mlp_in.kernel, transposed=True)
        yield Slot((f"{prefix}.mlp.Wo.weight",), layer.mlp_out.kernel, transposed=True)
    yield from norm_slots(model.final_norm, "final_norm")

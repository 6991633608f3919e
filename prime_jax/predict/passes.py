"""Which program predicts for which kind of model: PRIME's fast path, or another model as it stands."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from prime_jax.models import EmbeddingModel
from prime_jax.models.jasper import SteeredConfig
from prime_jax.models.mix import MixConfig
from prime_jax.models.prime import EmbeddingPredictor
from prime_jax.predict.forward import Attention, forward
from prime_jax.predict.weights import DType, lay_out


class ForwardPass(NamedTuple):
    """How a model predicts.

    Attributes:
        lay_out: Gives the weights for a compute dtype; takes `outputs_first` and `compile_with` by name, as
            `weights.lay_out` does.
        program: `program(attention, dtype)` is the function of weights, context, query and mask to compile.
    """

    lay_out: Callable[..., Any]
    program: Callable[[Attention, DType], Callable[..., Array]]


def forward_pass(model: EmbeddingModel) -> ForwardPass:
    """The forward pass of a model, float32 out."""
    if isinstance(model, EmbeddingPredictor):
        config = model.config
        return ForwardPass(
            partial(lay_out, model),
            lambda attention, dtype: partial(forward, config=config, attention=attention),
        )
    return ForwardPass(
        lambda dtype, **how: nnx.to_pure_dict(nnx.state(model, nnx.Param)),
        lambda attention, dtype: partial(_plain, config=model.config, dtype=dtype),
    )


def _plain(
    weights: Any,
    context: Float[Array, "B N D"],
    query: Float[Array, "B D"],
    context_mask: Bool[Array, "B N"],
    *,
    config: SteeredConfig | MixConfig,
    dtype: DType,
) -> Float[Array, "B E"]:
    """A model's own call with weights from outside; products in `dtype`."""
    shell: Any = config
    graph = nnx.split(nnx.eval_shape(lambda: shell.build(dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))))[0]
    model = nnx.merge(graph, weights)
    predicted: jax.Array = model(context, query, context_mask)
    return predicted

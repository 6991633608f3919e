"""JASPER: a question and a steering vector in, the embedding of the source to retrieve out.

In the house's terms the steering vector is the one turn of the context: `context[:, 0]`, and a masked turn is
zero steering. So the same data, trainer, search, service and bundle serve both kinds of model.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key
from pydantic import Field, model_validator

from prime_jax.errors import PredictorError
from prime_jax.models.base import CountedModel, ServedConfig
from prime_jax.models.inputs import embedding_inputs
from prime_jax.models.residual import capped
from prime_jax.nn.linear import Linear, unit
from prime_jax.nn.mlp import MLP
from prime_jax.nn.remat import Remat
from prime_jax.types import Prediction


class SteeredConfig(ServedConfig):
    """What the configurations of all steered models have in common."""

    input_dim: int = Field(default=384, ge=1, description="dimension D of question and steering embeddings")
    hidden_dim: int = Field(default=512, ge=8, description="width H of the encoders and the head")
    output_dim: int = Field(default=384, ge=1, description="dimension E of the predicted embedding")
    num_layers: int = Field(default=2, ge=1, le=12, description="blocks of each encoder and of the head")
    dropout: float = Field(default=0.1, ge=0.0, le=0.5, description="dropout probability in training")
    residual: Literal["none", "query"] = Field(
        default="none", description="what the prediction is added to: nothing, or the question"
    )
    max_delta: float | None = Field(
        default=None, gt=0, description="cap on the norm of what is added to the residual"
    )

    @model_validator(mode="after")
    def _residual_fits(self) -> "SteeredConfig":
        if self.residual != "none" and self.input_dim != self.output_dim:
            raise ValueError(
                f"residual {self.residual!r} adds the question to the output, so input_dim {self.input_dim} "
                f"must equal output_dim {self.output_dim}"
            )
        if self.residual == "none" and self.max_delta is not None:
            raise ValueError("max_delta caps what is added to a residual, but residual is 'none'")
        return self

    @property
    def max_context_length(self) -> int:
        """One: the steering vector takes the place of the turns."""
        return 1

    def fake_inputs(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the model's inputs, by argument name."""
        return embedding_inputs(batch, self.max_context_length, self.input_dim)


class SteeredModel(CountedModel):
    """What all steered models share: the call of everything outside training, answered by `details`."""

    config: SteeredConfig

    def __call__(
        self,
        context: Float[Array, "B N D"],
        query: Float[Array, "B D"],
        context_mask: Bool[Array, "B N"] | None = None,
        *,
        dropout_key: Key[Array, ""] | None = None,
        remat: Remat = "none",
    ) -> Float[Array, "B E"]:
        """Predict the embedding of the source to retrieve.

        Args:
            context: The steering vector as the one turn, `[B, 1, D]`; or no turn, `[B, 0, D]`.
            query: Question embeddings, `[B, D]`.
            context_mask: False where a row has no steering, `[B, 1]`; None means that all have.
            dropout_key: Turns dropout on (training).
            remat: Without effect; these models hold few activations.

        Returns:
            Unit-norm float32 predictions, `[B, E]`.

        Raises:
            PredictorError: If a shape does not fit the config.
        """
        return self.details(context, query, context_mask, dropout_key=dropout_key, remat=remat).embedding

    def details(self, *inputs: Any, **how: Any) -> Prediction:
        """The prediction with all that losses and explanations need; every model has its own."""
        raise NotImplementedError


class JasperConfig(SteeredConfig):
    """Shape and behaviour of a `JasperPredictor` (JASPER plan, task 1; docs/jasper.md)."""

    kind: Literal["jasper"] = Field(default="jasper", description="prime, jasper, subspace, text or mix")

    def build(self, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> "JasperPredictor":
        """Make the model this config describes, with fresh weights."""
        return JasperPredictor(self, dtype=dtype, rngs=rngs)


class JasperPredictor(SteeredModel):
    """Predicts a source embedding from a question and a steering vector (JASPER plan, task 1).

    Question and steering are encoded apart, `[B, D]` to `[B, H]`; a head reads both. With `residual: query`
    its answer is added to the question through a gate that starts at zero.

    Args:
        config: Shape and behaviour.
        dtype: Compute dtype of matrix products; parameters and everything else are float32.
        rngs: Source of the initial weights.
    """

    config: JasperConfig

    def __init__(self, config: JasperConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        hidden, blocks, rate = config.hidden_dim, config.num_layers, config.dropout
        self.config = config
        self.question_encoder = MLP(config.input_dim, hidden, blocks, rate, dtype=dtype, rngs=rngs)
        self.steering_encoder = MLP(config.input_dim, hidden, blocks, rate, dtype=dtype, rngs=rngs)
        self.head = MLP(2 * hidden, hidden, blocks, rate, dtype=dtype, rngs=rngs)
        self.output_proj = Linear(hidden, config.output_dim, dtype=dtype, rngs=rngs)
        if config.residual == "query":
            self.residual_gate = nnx.Param(jnp.zeros(()))

    def details(
        self,
        context: Float[Array, "B N D"],
        query: Float[Array, "B D"],
        context_mask: Bool[Array, "B N"] | None = None,
        *,
        dropout_key: Key[Array, ""] | None = None,
        remat: Remat = "none",
        progress: Float[Array, ""] | float = 1.0,
    ) -> Prediction:
        """The prediction with all that losses and explanations need; see `__call__`."""
        steering = steering_of(context, query, context_mask, self.config.input_dim)
        keys = keys_from(dropout_key, 3)
        question = query.astype(jnp.float32)
        read = [self.question_encoder(question, keys[0]), self.steering_encoder(steering, keys[1])]
        delta = self.output_proj(self.head(jnp.concatenate(read, axis=-1), keys[2]))
        if self.config.residual == "none":
            return Prediction(unit(delta))
        return Prediction(unit(question + capped(self.residual_gate[...] * delta, self.config.max_delta)))


def steering_of(context: Any, query: Any, context_mask: Any, dim: int) -> Float[Array, "B D"]:
    """The steering vectors `[B, D]` of a batch, zero where there is none.

    Raises:
        PredictorError: If a shape does not fit.
    """
    if context.ndim != 3 or query.ndim != 2:
        raise PredictorError(
            f"context must have shape [B, 1, D] and query [B, D], got {context.shape} and {query.shape}"
        )
    if query.shape != (context.shape[0], dim) or context.shape[2] != dim:
        raise PredictorError(
            f"context has shape {context.shape} and query {query.shape}, expected dimension {dim} and as "
            "many rows in both"
        )
    if context.shape[1] > 1:
        raise PredictorError(
            f"context has {context.shape[1]} turns, but this model takes one steering vector, [B, 1, D]"
        )
    if context_mask is not None and context_mask.shape != context.shape[:2]:
        raise PredictorError(f"context_mask has shape {context_mask.shape}, expected {context.shape[:2]}")
    if context.shape[1] == 0:
        return jnp.zeros(query.shape, jnp.float32)
    steering = context[:, 0].astype(jnp.float32)
    return steering if context_mask is None else jnp.where(context_mask, steering, 0.0)


def keys_from(key: Key[Array, ""] | None, count: int) -> list[Any]:
    """That many keys from one; as many None without one."""
    return [None] * count if key is None else [jax.random.fold_in(key, index) for index in range(count)]

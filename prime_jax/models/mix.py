"""What needs no layers: the query drawn towards the turns before it, and a linear map where there is one.

The untrained predictor and the tuned baselines of an evaluation are such models, so that what wins can be
exported and served like any other.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key
from pydantic import Field, model_validator

from prime_jax.errors import ConfigError
from prime_jax.models.base import ServedConfig, TurnsModel
from prime_jax.models.inputs import check_inputs, embedding_inputs
from prime_jax.models.residual import ages
from prime_jax.nn.linear import Linear, unit
from prime_jax.nn.remat import Remat

WEIGHT, DECAY = 0.3, 0.5  # of the newest turn, and from one turn to the one before it
TURNS_OF_MAP = {"none": 0, "query": 1, "context": 3}
"""How many embeddings a linear map takes, side by side."""


class MixConfig(ServedConfig):
    """Shape and behaviour of a `MixPredictor` (docs/untrained.md)."""

    kind: Literal["mix"] = Field(default="mix", description="prime, jasper, subspace, text or mix")
    input_dim: int = Field(default=384, ge=1, description="dimension D of the turn and query embeddings")
    output_dim: int = Field(default=384, ge=1, description="dimension of the predicted embedding, the same")
    max_context_length: int = Field(default=10, ge=1, le=50, description="most turns N that are looked at")
    average: bool = Field(default=False, description="the mean of the weighted turns instead of their sum")
    linear: Literal["none", "query", "context"] = Field(
        default="none", description="a linear map of the query, or of query, mean turn and newest turn"
    )
    keep_query: bool = Field(default=True, description="query and turns are added to what the map gives")

    @model_validator(mode="after")
    def _fields_fit_together(self) -> "MixConfig":
        if self.input_dim != self.output_dim:
            raise ValueError(
                f"input_dim {self.input_dim} must equal output_dim {self.output_dim}: the query is kept"
            )
        if not self.keep_query and self.linear == "none":
            raise ValueError("without a linear map the query must be kept")
        return self

    @property
    def session(self) -> Literal["cache", "window", "none"]:
        """What a session keeps of turns: them alone."""
        return "window"

    def build(self, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> "MixPredictor":
        """Make the model this config describes: the untrained mix, a linear map of zeros."""
        return MixPredictor(self, dtype=dtype, rngs=rngs)

    def fake_inputs(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the model's inputs, by argument name."""
        return embedding_inputs(batch, self.max_context_length, self.input_dim)


class MixPredictor(TurnsModel):
    """`unit(query + sum of turn_weights[age] * turn + linear_map(...))` of unit-norm query and turns.

    Attributes:
        turn_weights: Weight of a turn by how many came after it, `[N]`.
        linear_map: The linear map; there where the config has one.

    Args:
        config: Shape and behaviour.
        dtype: Compute dtype of the map's product; parameters and everything else are float32.
        rngs: Of no effect: nothing starts random.
    """

    def __init__(self, config: MixConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.turn_weights = nnx.Param(WEIGHT * DECAY ** jnp.arange(config.max_context_length))
        if embeddings := TURNS_OF_MAP[config.linear]:
            width = embeddings * config.input_dim
            self.linear_map = Linear(width, config.output_dim, dtype=dtype, rngs=rngs)
            self.linear_map.kernel.set_value(jnp.zeros_like(self.linear_map.kernel[...]))

    def __call__(
        self,
        context: Float[Array, "B N D"],
        query: Float[Array, "B D"],
        context_mask: Bool[Array, "B N"] | None = None,
        *,
        dropout_key: Key[Array, ""] | None = None,
        remat: Remat = "none",
    ) -> Float[Array, "B E"]:
        """Predict the embedding of the passage to retrieve.

        Args:
            context: Turn embeddings, oldest first, `[B, N, D]`; N from 0 to max_context_length.
            query: Query embeddings, `[B, D]`.
            context_mask: True where a turn is real, `[B, N]`; None means all are. What stands in a padded
                slot has no influence.
            dropout_key: Of no effect: there is no dropout.
            remat: Of no effect: there is nothing to compute again.

        Returns:
            Unit-norm float32 predictions, `[B, E]`.

        Raises:
            PredictorError: If a shape does not fit the config.
        """
        config = self.config
        check_inputs(context, query, context_mask, dim=config.input_dim, most=config.max_context_length)
        if context_mask is None:
            context_mask = jnp.ones(context.shape[:2], bool)
        turns = unit(jnp.where(context_mask[..., None], context.astype(jnp.float32), 0.0))
        query = unit(query.astype(jnp.float32))
        count = jnp.maximum(jnp.sum(context_mask, axis=1, keepdims=True), 1).astype(jnp.float32)
        age = ages(context_mask)
        added = jnp.zeros_like(query)
        if self.config.keep_query:
            weights = jnp.where(context_mask, self.turn_weights[...][age], 0.0)
            mix = jnp.einsum("bn,bnd->bd", weights, turns)
            added = query + (mix / count if self.config.average else mix)
        if self.config.linear == "query":
            added = added + self.linear_map(query)
        elif self.config.linear == "context":
            newest = jnp.sum(jnp.where((age == 0)[..., None], turns, 0.0), axis=1)
            mean = jnp.sum(turns, axis=1) / count
            added = added + self.linear_map(jnp.concatenate([query, mean, newest], axis=1))
        return unit(added)


def mix_of(config: MixConfig, weight: float, decay: float) -> MixPredictor:
    """A model whose turns weigh `weight * decay^age`, and whose map, if it has one, gives nothing yet.

    Raises:
        ConfigError: If the weight is negative or not finite, or the decay not from 0 to 1.
    """
    if not 0 <= weight < math.inf or not 0 <= decay <= 1:
        raise ConfigError(
            f"a mix has a finite weight of 0 or more and a decay from 0 to 1, not {weight} and {decay}"
        )
    model = config.build(rngs=nnx.Rngs(0))
    weights: Any = weight * jnp.float32(decay) ** jnp.arange(config.max_context_length)
    model.turn_weights.set_value(weights)
    return model

"""JASPER with subspaces: a router picks among known clusters, and the answer is an anchor plus a residual.

coarse = routing weights x centroids        fine = what leads from there to the prediction
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key
from pydantic import Field, model_validator

from prime_jax.models.jasper import SteeredConfig, SteeredModel, keys_from, steering_of
from prime_jax.models.residual import capped
from prime_jax.nn.linear import Linear, einsum_accumulate_f32, unit
from prime_jax.nn.mlp import MLP
from prime_jax.nn.remat import Remat
from prime_jax.nn.router import AtInference, gumbel_softmax, gumbel_temperature, routing_weights
from prime_jax.types import Prediction

CENTROIDS = "centroids"


class SubspaceConfig(SteeredConfig):
    """Shape and behaviour of a `DecomposedJasperPredictor` (JASPER plan, tasks 9 and 10; docs/jasper.md)."""

    kind: Literal["subspace"] = Field(default="subspace", description="prime, jasper, subspace, text or mix")
    num_subspaces: int = Field(default=32, ge=2, description="clusters K that the router chooses among")
    routing: AtInference = Field(default="softmax", description="how subspaces are weighed when predicting")
    straight_through: bool = Field(default=False, description="choose a single subspace in training")
    gumbel_start: float = Field(default=1.0, gt=0, description="first temperature of the Gumbel-softmax")
    gumbel_end: float = Field(default=0.1, gt=0, description="its last temperature, reached on a cosine")
    fine_input: Literal["concat", "add"] = Field(
        default="concat", description="how the fine part reads question, steering and coarse vector"
    )

    @model_validator(mode="after")
    def _one_space(self) -> "SubspaceConfig":
        if self.gumbel_end > self.gumbel_start:
            raise ValueError(f"gumbel_end {self.gumbel_end} is above gumbel_start {self.gumbel_start}")
        if self.input_dim != self.output_dim:
            raise ValueError(
                f"centroids lie in the space of the sources, so input_dim {self.input_dim} must equal "
                f"output_dim {self.output_dim}"
            )
        return self

    def build(self, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> "DecomposedJasperPredictor":
        """Make the model this config describes, with fresh weights and all-zero centroids."""
        return DecomposedJasperPredictor(self, dtype=dtype, rngs=rngs)


class SubspaceRouter(nnx.Module):
    """Question and steering to logits over K subspaces (JASPER plan, task 9)."""

    def __init__(self, config: SubspaceConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.body = MLP(
            2 * config.input_dim,
            config.hidden_dim,
            config.num_layers,
            config.dropout,
            dtype=dtype,
            rngs=rngs,
        )
        self.choice = Linear(config.hidden_dim, config.num_subspaces, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        question: Float[Array, "B D"],
        steering: Float[Array, "B D"],
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B K"]:
        """Unnormalised log-probabilities of the subspaces; a key turns dropout on."""
        return self.choice(self.body(jnp.concatenate([question, steering], axis=-1), key))


class DecomposedJasperPredictor(SteeredModel):
    """Prediction = coarse + fine, exactly, and of unit norm (JASPER plan, task 10).

    `coarse` is the mix of frozen centroids that the router chose, so it lies in their convex hull. `fine`
    leads from it to the prediction; its norm, the atypicality, says how far the prediction is from what the
    chosen clusters stand for.

    Args:
        config: Shape and behaviour.
        dtype: Compute dtype of matrix products; parameters and everything else are float32.
        rngs: Source of the initial weights.

    Attributes:
        centroids: Unit vectors `[K, E]`, never trained. All zero until training puts those of the data there.
    """

    config: SubspaceConfig

    def __init__(self, config: SubspaceConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        hidden, blocks, rate, dim = config.hidden_dim, config.num_layers, config.dropout, config.input_dim
        self.config = config
        self.router = SubspaceRouter(config, dtype=dtype, rngs=rngs)
        self.question_encoder = MLP(dim, hidden, blocks, rate, dtype=dtype, rngs=rngs)
        self.steering_encoder = MLP(dim, hidden, blocks, rate, dtype=dtype, rngs=rngs)
        self.coarse_encoder = MLP(dim, hidden, blocks, rate, dtype=dtype, rngs=rngs)
        parts = 3 if config.fine_input == "concat" else 1
        self.head = MLP(parts * hidden, hidden, blocks, rate, dtype=dtype, rngs=rngs)
        self.output_proj = Linear(hidden, config.output_dim, dtype=dtype, rngs=rngs)
        self.centroids = nnx.Param(jnp.zeros((config.num_subspaces, config.output_dim)))
        if config.residual == "query":
            self.residual_gate = nnx.Param(jnp.zeros(()))
            self.coarse_gate = nnx.Param(jnp.zeros(()))

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
        """The prediction with routing, coarse and fine part; see `__call__`.

        With a dropout key subspaces are chosen by Gumbel-softmax, whose temperature falls with `progress` (0
        to 1); without one there is no noise.
        """
        config = self.config
        steering = steering_of(context, query, context_mask, config.input_dim)
        question = query.astype(jnp.float32)
        keys = keys_from(dropout_key, 6)
        logits = self.router(question, steering, keys[0])
        if dropout_key is None:
            routing = routing_weights(logits, config.routing)
        else:
            temperature = gumbel_temperature(progress, config.gumbel_start, config.gumbel_end)
            routing = gumbel_softmax(logits, temperature, keys[1], straight_through=config.straight_through)
        centroids = jax.lax.stop_gradient(self.centroids[...])
        with jax.named_scope("coarse"):
            coarse = einsum_accumulate_f32("bk,ke->be", routing, centroids, jnp.float32)
        parts = [
            self.question_encoder(question, keys[2]),
            self.steering_encoder(steering, keys[3]),
            self.coarse_encoder(coarse, keys[4]),
        ]
        read = jnp.concatenate(parts, axis=-1) if config.fine_input == "concat" else sum(parts)
        delta = self.output_proj(self.head(jnp.asarray(read), keys[5]))
        if config.residual == "none":
            whole = coarse + delta
        else:
            added = self.coarse_gate[...] * coarse + self.residual_gate[...] * delta
            whole = question + capped(added, config.max_delta)
        fine = unit(whole) - coarse
        return Prediction(coarse + fine, logits, routing, coarse, fine)

    def num_params(self) -> int:
        """Number of trained numbers; the centroids are not."""
        return super().num_params() - self.config.num_subspaces * self.config.output_dim

"""PRIME's embedding predictor: past turns and a query in, the embedding of the ideal passage out."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key
from pydantic import Field, model_validator

from prime_jax.models.base import ServedConfig, TurnsModel
from prime_jax.models.inputs import check_inputs, embedding_inputs
from prime_jax.models.layers import InitFrom, check_block, llama_shape
from prime_jax.models.residual import capped, mixed_turns
from prime_jax.nn.blocks import PredictorTransformerBlock, layer_norm
from prime_jax.nn.linear import Linear, dropout, unit
from prime_jax.nn.llama import LlamaBlock, RMSNorm
from prime_jax.nn.masks import ContextAttention, attention_mask, positions
from prime_jax.nn.remat import Remat, rematerialised
from prime_jax.nn.rotary import RopeScaling, RotaryTable, Rotation, rotary_table

TOKEN_STD = 0.02
COPY_WEIGHT, COPY_DECAY = 0.5, 0.7  # the recency mix that the copy path starts from


class PredictorConfig(ServedConfig):
    """Shape and behaviour of an `EmbeddingPredictor` (spec section 8; docs/model.md)."""

    kind: Literal["prime"] = Field(default="prime", description="prime, jasper, subspace, text or mix")
    input_dim: int = Field(default=1024, ge=1, description="dimension D of the turn and query embeddings")
    hidden_dim: int = Field(default=2048, ge=128, description="width H of the transformer")
    output_dim: int = Field(default=1024, ge=1, description="dimension E of the predicted embedding")
    num_layers: int = Field(default=4, ge=1, le=12, description="transformer layers")
    num_heads: int = Field(default=8, ge=1, description="attention heads; must divide hidden_dim")
    max_context_length: int = Field(default=10, ge=1, le=50, description="most turns N that are looked at")
    conversation_input: bool = Field(
        default=False, description="the newest turn given is the embedding of query and turns as one text"
    )
    dropout: float = Field(default=0.1, ge=0.0, le=0.5, description="dropout probability in training")
    context_attention: ContextAttention = Field(default="full", description="what turns may look at")
    residual: Literal["none", "query", "copy", "linear"] = Field(
        default="none", description="what the prediction is added to"
    )
    max_delta: float | None = Field(
        default=None, gt=0, description="cap on the norm of what is added to the residual"
    )
    block: Literal["gelu", "llama"] = Field(default="gelu", description="kind of transformer layer")
    num_kv_heads: int | None = Field(
        default=None, ge=1, description="llama: heads of keys and values; null: num_heads"
    )
    head_dim: int | None = Field(
        default=None, ge=2, description="llama: width of a head; null: hidden_dim / num_heads"
    )
    mlp_dim: int | None = Field(default=None, ge=1, description="llama: width of the MLP; null: 4 hidden_dim")
    norm_eps: float = Field(default=1e-5, gt=0, description="llama: epsilon of RMSNorm")
    rope_theta: float = Field(default=10000.0, gt=1, description="llama: base of the rotary frequencies")
    rope_scaling: RopeScaling | None = Field(default=None, description="llama: Llama 3's rotary scaling")
    init_from: InitFrom | None = Field(
        default=None, description="llama: Hugging Face folder and layers [a, b) that training starts from"
    )

    @model_validator(mode="after")
    def _fields_fit_together(self) -> "PredictorConfig":
        if self.head_dim is None and self.hidden_dim % self.num_heads:
            raise ValueError(f"hidden_dim {self.hidden_dim} is not divisible by num_heads {self.num_heads}")
        if self.residual != "none" and self.input_dim != self.output_dim:
            raise ValueError(
                f"residual {self.residual!r} adds the query to the output, so input_dim {self.input_dim} "
                f"must equal output_dim {self.output_dim}"
            )
        if self.residual == "none" and self.max_delta is not None:
            raise ValueError("max_delta caps what is added to a residual, but residual is 'none'")
        check_block(self)
        return self

    @property
    def takes_one_text(self) -> bool:
        """Whether the newest turn given is the embedding of query and turns as one text."""
        return self.conversation_input

    @property
    def session(self) -> Literal["cache", "window", "none"]:
        """What a session keeps of turns: what was computed of them."""
        return "cache"

    @property
    def copies_turns(self) -> bool:
        """Whether a mix of the turns is added to the query."""
        return self.residual in ("copy", "linear")

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """Width of an attention head."""
        return self.head_dim or self.hidden_dim // self.num_heads

    def rotary(self) -> RotaryTable | None:
        """Angles of every position, or None where positions are embeddings."""
        if self.block != "llama":
            return None
        return rotary_table(self.max_context_length + 2, self.head_size, self.rope_theta, self.rope_scaling)

    def build(self, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> "EmbeddingPredictor":
        """Make the model this config describes, with fresh weights."""
        return EmbeddingPredictor(self, dtype=dtype, rngs=rngs)

    def fake_inputs(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the model's inputs, by argument name."""
        return embedding_inputs(batch, self.max_context_length, self.input_dim)


Block = PredictorTransformerBlock | LlamaBlock


class EmbeddingPredictor(TurnsModel):
    """JEPA-style predictor of the embedding to search with (FR-PRED-001 to 007).

    The sequence `[PRED], turns, query` goes through pre-norm transformer layers; the [PRED] token's answer,
    projected and normalised, is the prediction. With a `residual` the answer is added to the query, or to the
    query and a learned mix of the turns, through a gate that starts at zero: training starts at a baseline.
    The residual 'linear' also adds a linear map, zero at first, of the query and that mix.

    Args:
        config: Shape and behaviour.
        dtype: Compute dtype of matrix products; parameters and everything else are float32.
        rngs: Source of the initial weights.
    """

    def __init__(self, config: PredictorConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        hidden = config.hidden_dim
        self.config = config
        self.context_proj = Linear(config.input_dim, hidden, dtype=dtype, rngs=rngs)
        self.query_proj = Linear(config.input_dim, hidden, dtype=dtype, rngs=rngs)
        self.output_proj = Linear(hidden, config.output_dim, dtype=dtype, rngs=rngs)
        self.pred_token = nnx.Param(TOKEN_STD * jax.random.normal(rngs.params(), (hidden,)))
        if config.block == "gelu":
            self.pos_embedding = nnx.Param(
                TOKEN_STD * jax.random.normal(rngs.params(), (config.max_context_length + 2, hidden))
            )
        self.layers: nnx.List[Block] = nnx.List(_block(config, dtype, rngs) for _ in range(config.num_layers))
        self.norm = layer_norm(hidden, rngs) if config.block == "gelu" else RMSNorm(hidden, config.norm_eps)
        if config.residual != "none":
            self.residual_gate = nnx.Param(jnp.zeros(()))
        if config.copies_turns:
            mix = COPY_WEIGHT * COPY_DECAY ** jnp.arange(config.max_context_length)
            self.copy_age = nnx.Param(jnp.log(jnp.expm1(mix)))  # softplus of it is the recency mix
            self.copy_content = nnx.Param(jnp.zeros(hidden))
        if config.residual == "linear":
            self.linear_map = Linear(2 * config.input_dim, config.output_dim, dtype=dtype, rngs=rngs)
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
            dropout_key: Turns dropout on (training).
            remat: What the backward pass recomputes instead of keeping it (FR-PRED-010).

        Returns:
            Unit-norm float32 predictions, `[B, E]`.

        Raises:
            PredictorError: If a shape does not fit the config.
        """
        config = self.config
        check_inputs(context, query, context_mask, dim=config.input_dim, most=config.max_context_length)
        if context_mask is None:
            context_mask = jnp.ones(context.shape[:2], bool)
        context = jnp.where(context_mask[..., None], context.astype(jnp.float32), 0.0)
        query = query.astype(jnp.float32)
        pred, turns = self._transform(context, query, context_mask, dropout_key, remat)
        delta = self.output_proj(self.norm(pred))
        if self.config.residual == "none":
            return unit(delta)
        base, delta = query, self.residual_gate[...] * delta
        if self.config.copies_turns:
            with jax.named_scope("mixed_turns"):
                content = turns @ self.copy_content[...]
            mix = mixed_turns(context, context_mask, self.copy_age[...], content)
            base = query + mix
            if self.config.residual == "linear":
                delta = delta + self._linear(query, mix, dropout_key)
        return unit(base + capped(delta, self.config.max_delta))

    def _transform(
        self,
        context: Float[Array, "B N D"],
        query: Float[Array, "B D"],
        context_mask: Bool[Array, "B N"],
        dropout_key: Key[Array, ""] | None,
        remat: Remat,
    ) -> tuple[Float[Array, "B H"], Float[Array, "B N H"]]:
        """Answer of [PRED] after the last layer, and the turns as they enter it."""
        batch = query.shape[0]
        pred = jnp.broadcast_to(self.pred_token[...], (batch, 1, self.config.hidden_dim))
        tokens = [pred, self.context_proj(context), self.query_proj(query)[:, None]]
        x = jnp.concatenate(tokens, axis=1)
        table, rotation = self.config.rotary(), None
        if table is None:
            x = x + self.pos_embedding[...][positions(context_mask)]
        else:
            rotation = table.at(positions(context_mask))
        mask = attention_mask(context_mask, self.config.context_attention)
        last = len(self.layers) - 1
        turns = x[:, 1:-1]
        for index, layer in enumerate(self.layers):
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
            turns = x[:, 1:-1]
            x = _apply(layer, x, mask, rotation, key, rows=1 if index == last else None, remat=remat)
        return x[:, 0], turns

    def _linear(
        self, query: Float[Array, "B D"], mix: Float[Array, "B D"], dropout_key: Key[Array, ""] | None
    ) -> Float[Array, "B E"]:
        """The linear map of query and mix; in training parts of both are dropped."""
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, len(self.layers))
        given = dropout(jnp.concatenate([query, mix], axis=1), self.config.dropout, key)
        added: Float[Array, "B E"] = self.linear_map(given)
        return added


def _block(config: PredictorConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> Block:
    if config.block == "llama":
        return LlamaBlock(llama_shape(config), config.dropout, dtype=dtype, rngs=rngs)
    return PredictorTransformerBlock(
        config.hidden_dim, config.num_heads, config.dropout, dtype=dtype, rngs=rngs
    )


def _apply(
    layer: Block,
    x: Float[Array, "B S H"],
    mask: Bool[Array, "B S S"],
    rotation: Rotation | None,
    key: Key[Array, ""] | None,
    *,
    rows: int | None,
    remat: Remat,
) -> Float[Array, "B R H"]:
    graph, params = nnx.split(layer)

    def block(params: Any, x: Float[Array, "B S H"]) -> Float[Array, "B R H"]:
        merged = nnx.merge(graph, params)
        where = (mask,) if rotation is None else (mask, rotation)
        answer: Float[Array, "B R H"] = merged(x, *where, rows=rows, key=key)
        return answer

    answer: Float[Array, "B R H"] = rematerialised(block, remat)(params, x)
    return answer

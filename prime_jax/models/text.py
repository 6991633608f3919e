"""The text predictor: it reads query and turns themselves, as one sequence.

It starts as the encoder that the memory was made with and is trained against that memory, which stays as it
is: passages are not encoded anew. ConvDR (arXiv 2105.04166) trains the query side alone, too.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key
from pydantic import Field, model_validator

from prime_jax.errors import ConfigError
from prime_jax.models.base import CountedModel, ServedConfig
from prime_jax.nn.bert import Pooling, pool
from prime_jax.nn.encoders import EncoderConfig, build_encoder
from prime_jax.nn.linear import einsum_accumulate_f32, unit
from prime_jax.nn.remat import Remat
from prime_jax.types import SEQUENCES_PER_ROW, Batch, Conversations, Prediction

ROLES = 3  # the query, what was said in answer to its author, what its author said


class TextConfig(ServedConfig):
    """What a `TextPredictor` reads and how (docs/text.md)."""

    kind: Literal["text"] = Field(default="text", description="prime, jasper, subspace, text or mix")
    input_dim: int = Field(default=384, ge=1, description="dimension of the memory's embeddings")
    output_dim: int = Field(default=384, ge=1, description="dimension of the predicted embedding, the same")
    max_context_length: int = Field(default=10, ge=0, le=50, description="most turns N that are read")
    max_tokens: int = Field(default=96, ge=8, description="most tokens that are read; the oldest are cut")
    separate_turns: bool = Field(default=True, description="put a separator between query and turns")
    dropout: float = Field(default=0.0, ge=0.0, le=0.5, description="dropout probability in training")
    roles: bool = Field(default=True, description="learn an embedding of who said what, zero at first")
    query_weight: float = Field(
        default=0.0, ge=0.0, description="how much of the query's own embedding is added to that of the whole"
    )
    encoder: EncoderConfig | None = Field(
        default=None, discriminator="model_type", description="architecture; null: that of data.encoder"
    )
    pooling: Pooling | None = Field(default=None, description="mean or cls; null: that of data.encoder")
    lower_case: bool = Field(default=False, description="lower-case texts first; taken from data.encoder")
    separator_id: int | None = Field(default=None, description="id of the token between turns; likewise")

    @model_validator(mode="after")
    def _fields_fit_together(self) -> "TextConfig":
        if self.input_dim != self.output_dim:
            raise ValueError(
                f"input_dim {self.input_dim} must equal output_dim {self.output_dim}: both are the memory's"
            )
        if self.roles and not self.separate_turns:
            raise ValueError("roles are told by separators: set separate_turns true, or roles false")
        if self.query_weight and not self.separate_turns:
            raise ValueError("a separator ends the query: set separate_turns true, or query_weight 0")
        if self.encoder is not None and self.encoder.hidden_size != self.output_dim:
            raise ValueError(
                f"the encoder is {self.encoder.hidden_size} wide, output_dim is {self.output_dim}"
            )
        if self.encoder is not None and self.max_tokens > self.encoder.longest:
            raise ValueError(
                f"max_tokens {self.max_tokens} is more than the {self.encoder.longest} that the encoder reads"
            )
        return self

    @property
    def reads_text(self) -> bool:
        """True: requests are texts."""
        return True

    def build(self, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> "TextPredictor":
        """Make the model this config describes, with fresh weights.

        Raises:
            ConfigError: If it does not say which encoder; training takes that of `data.encoder`.
        """
        return TextPredictor(self, dtype=dtype, rngs=rngs)

    def inputs_of(self, batch: Batch) -> tuple[Any, ...]:
        """What the model reads of a batch."""
        return (batch.conversations,)

    def forward_flops(self) -> float:
        """FLOPs of reading one sequence of `max_tokens`: every matrix product, two per multiply-add."""
        if self.encoder is None:
            return 0.0
        layers, tokens = self.encoder.num_hidden_layers, self.max_tokens
        shapes = nnx.eval_shape(lambda: self.build(rngs=nnx.Rngs(0)).encoder.layers)
        leaves = jax.tree.leaves(nnx.state(shapes, nnx.Param))
        matrices = sum(int(leaf.size) for leaf in leaves if leaf.ndim == 2)
        attention = 2 * tokens * self.encoder.hidden_size * layers
        passes = 2 if self.query_weight else 1
        return passes * 2.0 * tokens * (matrices + attention)


class TextPredictor(CountedModel):
    """An encoder of conversations (see the module's text).

    Args:
        config: What it reads and how.
        dtype: Compute dtype of matrix products; parameters and everything else are float32.
        rngs: Source of the initial weights, which those of an encoder replace.

    Raises:
        ConfigError: If the config does not say which encoder.
    """

    def __init__(self, config: TextConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        if config.encoder is None or config.pooling is None or config.separator_id is None:
            raise ConfigError(
                "model.encoder, pooling and separator_id are not set: training takes them of data.encoder"
            )
        self.config = config
        self.encoder = build_encoder(config.encoder, dtype, rngs=rngs)
        if config.roles:
            self.roles = nnx.Param(jnp.zeros((ROLES, config.output_dim)))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        remat: Remat = "none",
    ) -> Float[Array, "B E"]:
        """Predict from sequences, one to a row.

        Args:
            tokens: Token ids as `ConversationTokenizer` makes them, `[B, T]`; padding behind them.
            mask: True where a token is real, `[B, T]`.
            positions: Of the tokens; None counts them from 0.
            remat: What the backward pass recomputes instead of keeping it.

        Returns:
            Unit-norm float32 predictions, `[B, E]`.
        """
        separators = tokens == self.config.separator_id
        age = jnp.cumsum(separators, axis=1, dtype=jnp.int32) - separators
        added = self._said_by(age) if self.config.roles else None

        def embedded(mask: Bool[Array, "B T"]) -> Float[Array, "B E"]:
            hidden = self.encoder(tokens, mask, positions=positions, added=added, remat=remat)
            assert self.config.pooling is not None
            return pool(hidden, mask, self.config.pooling)

        return self._with_query(embedded(mask), lambda: embedded(mask & (age == 0)))

    def details(
        self,
        conversations: Conversations,
        *,
        dropout_key: Key[Array, ""] | None = None,
        remat: Remat = "none",
        progress: Float[Array, ""] | float = 1.0,
    ) -> Prediction:
        """The predictions for a batch's conversations, `[B, E]`."""
        vectors = self.packed(conversations, dropout_key=dropout_key, remat=remat)
        return Prediction(vectors.reshape(-1, vectors.shape[-1])[conversations.slots])

    def packed(
        self,
        conversations: Conversations,
        *,
        dropout_key: Key[Array, ""] | None = None,
        remat: Remat = "none",
    ) -> Float[Array, "R P E"]:
        """Predictions of all sequences where they lie, P = `SEQUENCES_PER_ROW`; zeros where there is none."""
        tokens, segments, positions, _ = conversations
        separators = (tokens == self.config.separator_id) & (segments > 0)
        before = jnp.cumsum(separators, axis=1, dtype=jnp.int32) - separators
        age = before - jax.lax.cummax(jnp.where(positions == 0, before, 0), axis=1)  # those of its sequence
        added = self._said_by(age) if self.config.roles else None
        sequence = segments[:, None, :] == jnp.arange(1, SEQUENCES_PER_ROW + 1)[None, :, None]

        def embedded(read: Bool[Array, "R S"]) -> Float[Array, "R P E"]:
            seen = (segments[:, :, None] == segments[:, None, :]) & read[:, None, :]
            hidden = self.encoder(
                tokens,
                seen,
                positions=positions,
                added=added,
                rate=self.config.dropout,
                dropout_key=dropout_key if self.config.dropout else None,
                remat=remat,
            )
            member = (
                sequence & (read & (positions == 0) if self.config.pooling == "cls" else read)[:, None, :]
            )
            with jax.named_scope("pooling"):
                summed = einsum_accumulate_f32(
                    "rps,rsh->rph", member.astype(jnp.float32), hidden, jnp.float32
                )
            return unit(summed / jnp.maximum(member.sum(axis=2, keepdims=True), 1).astype(jnp.float32))

        real = segments > 0
        return self._with_query(embedded(real), lambda: embedded(real & (age == 0)))

    def _with_query(
        self, whole: Float[Array, "*a E"], query: Callable[[], Float[Array, "*a E"]]
    ) -> Float[Array, "*a E"]:
        """Embeddings of conversations, with as much of their queries' own as the config says."""
        if not self.config.query_weight:
            return whole
        return unit(whole + self.config.query_weight * query())

    def _said_by(self, age: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """Embedding of who said a token, by how many texts stand before its own: 0 in the query."""
        roles: Float[Array, "B T E"] = self.roles[...][jnp.where(age == 0, 0, 2 - (age & 1))]
        return roles

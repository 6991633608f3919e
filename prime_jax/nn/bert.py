"""BERT as a text encoder (Devlin et al. 2018): token ids in, one embedding per text out.

The family covers MiniLM, BGE, E5 and every other sentence encoder with `model_type: bert`, and RoBERTa and
XLM-R (multilingual E5, BGE-M3), which count positions from another start. Norms, softmax and GELU stay
float32 whatever the compute dtype.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import pydantic
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from prime_jax.errors import DataError
from prime_jax.frozen import Frozen
from prime_jax.nn.encoder_attention import join_heads, masked_attention, split_qkv
from prime_jax.nn.encoder_products import FUSED_FROM, Tf32Linear, fused_attention
from prime_jax.nn.linear import Linear, dropout, unit
from prime_jax.nn.remat import Remat, keeping_inputs, rematerialised

Pooling = Literal["mean", "cls"]


class BertConfig(Frozen):
    """The fields of a Hugging Face `config.json` that decide what a BERT computes; other fields are ignored.

    A variant this module does not compute (another activation, relative positions, a decoder) is refused.
    """

    model_config = pydantic.ConfigDict(extra="ignore")

    model_type: Literal["bert", "roberta", "xlm-roberta"]
    vocab_size: int = pydantic.Field(gt=0)
    hidden_size: int = pydantic.Field(gt=0)
    num_hidden_layers: int = pydantic.Field(gt=0)
    num_attention_heads: int = pydantic.Field(gt=0)
    intermediate_size: int = pydantic.Field(gt=0)
    max_position_embeddings: int = pydantic.Field(gt=0)
    type_vocab_size: int = pydantic.Field(gt=0)
    layer_norm_eps: float = pydantic.Field(gt=0)
    hidden_act: Literal["gelu"]
    position_embedding_type: Literal["absolute"] = "absolute"
    is_decoder: Literal[False] = False
    pad_token_id: int = pydantic.Field(default=0, ge=0)

    @pydantic.model_validator(mode="after")
    def _heads_divide_width(self) -> "BertConfig":
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        return self

    @property
    def first_position(self) -> int:
        """Row of the position table that the first token takes; RoBERTa leaves those up to padding unused."""
        return 0 if self.model_type == "bert" else self.pad_token_id + 1

    @property
    def longest(self) -> int:
        """Most tokens of a text."""
        return self.max_position_embeddings - self.first_position

    def told(self) -> str:
        """The fields that count as JSON, for an encoder's identity; BERT's padding counts for nothing."""
        return self.model_dump_json(exclude={"pad_token_id"} if self.model_type == "bert" else None)

    @classmethod
    def parse(cls, fields: Any, source: str) -> "BertConfig":
        """Check the content of a `config.json`.

        Args:
            fields: The parsed JSON.
            source: Name of the file, for messages.

        Raises:
            DataError: If a field is missing, malformed or not supported; the message names file and field.
        """
        try:
            return cls.model_validate(fields)
        except pydantic.ValidationError as wrong:
            problems = "; ".join(
                f"{'.'.join(map(str, error['loc'])) or 'config'}: {error['msg']}"
                + ("" if error["type"] == "missing" else f", not {error['input']!r}") * bool(error["loc"])
                for error in wrong.errors()
            )
            raise DataError(f"{source}: not a BERT this library can run ({problems})") from None


class BertLayer(nnx.Module):
    """Self-attention and MLP, each followed by its residual and LayerNorm (post-norm)."""

    def __init__(self, config: BertConfig, *, dtype: DTypeLike, rngs: nnx.Rngs, tf32: bool, fused: bool):
        hidden = config.hidden_size
        linear = Tf32Linear if tf32 else Linear
        self.qkv = linear(hidden, 3 * hidden, dtype=dtype, result_dtype=dtype, rngs=rngs)
        self.attention_out = linear(hidden, hidden, dtype=dtype, result_dtype=dtype, rngs=rngs)
        self.attention_norm = _layer_norm(config, rngs)
        self.mlp_in = linear(hidden, config.intermediate_size, dtype=dtype, result_dtype=dtype, rngs=rngs)
        self.mlp_out = linear(config.intermediate_size, hidden, dtype=dtype, result_dtype=dtype, rngs=rngs)
        self.mlp_norm = _layer_norm(config, rngs)
        self.num_heads = config.num_attention_heads
        self.dtype, self.tf32, self.fused = dtype, tf32, fused

    def __call__(
        self,
        x: Float[Array, "B S H"],
        mask: Bool[Array, "B Q S"],
        *,
        rate: float = 0.0,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B S H"]:
        """Transform the tokens `x`, each looking where the mask allows; Q is S, or 1 for the same for all.

        With a key, `rate` of what attention and MLP add is dropped.
        """
        shape = x.shape
        first, second = (None, None) if key is None else jax.random.split(key)
        x = x.reshape(-1, shape[-1])  # on CPUs products of two axes are a quarter faster, norms as well
        attended = self.attention_out(self._attend(x, mask, shape))
        x = keeping_inputs(self.attention_norm, self.dtype)(x + dropout(attended, rate, first))
        inner = jax.checkpoint(_gelu)(self.mlp_in.product(x), self.mlp_in.bias[...])
        inner = dropout(self.mlp_out(inner), rate, second)
        out: Array = keeping_inputs(self.mlp_norm, self.dtype)(x + inner)
        return out.reshape(shape)

    def _attend(
        self, x: Float[Array, "tokens H"], mask: Bool[Array, "B Q S"], shape: tuple[Any, ...]
    ) -> Float[Array, "tokens H"]:
        batch, tokens, hidden = shape
        qkv = self.qkv(x).reshape(batch, tokens, 3 * hidden)
        if self.fused and tokens >= FUSED_FROM and mask.shape[1] == 1:
            parts = qkv.reshape(batch, tokens, 3, self.num_heads, hidden // self.num_heads)
            queries, keys, values = jnp.moveaxis(parts, 2, 0)
            mixed = fused_attention(queries, keys, values, mask[:, 0].sum(axis=1), self.dtype)
        else:
            queries, keys, values = split_qkv(qkv, self.num_heads)
            mixed = join_heads(masked_attention(queries, keys, values, mask[:, None], self.dtype, self.tf32))
        return mixed.reshape(-1, hidden)


class BertModel(nnx.Module):
    """The encoder: embeddings of word, position and type 0 (a single text), then the layers.

    Args:
        config: What to build.
        dtype: Compute dtype of the products; they accumulate in float32.
        rngs: Source of the initial weights, which pretrained ones replace.
        tf32: Whether the factors of float32 products may be rounded to TF32.
        fused: Whether texts of some length take `fused_attention`; masks then begin with real tokens.
    """

    def __init__(
        self,
        config: BertConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        tf32: bool = False,
        fused: bool = False,
    ):
        hidden = config.hidden_size
        self.words = nnx.Embed(config.vocab_size, hidden, rngs=rngs)
        self.positions = nnx.Embed(config.max_position_embeddings, hidden, rngs=rngs)
        self.types = nnx.Embed(config.type_vocab_size, hidden, rngs=rngs)
        self.norm = _layer_norm(config, rngs)
        self.first_position = config.first_position
        self.layers = nnx.List(
            [
                BertLayer(config, dtype=dtype, rngs=rngs, tf32=tf32, fused=fused)
                for _ in range(config.num_hidden_layers)
            ]
        )

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        mask: Bool[Array, "B S"] | Bool[Array, "B S S"],
        *,
        positions: Int[Array, "B S"] | None = None,
        added: Float[Array, "B S H"] | None = None,
        rate: float = 0.0,
        dropout_key: Key[Array, ""] | None = None,
        remat: Remat = "none",
    ) -> Float[Array, "B S H"]:
        """Contextual embeddings of every token.

        Args:
            tokens: Token ids, `[B, S]` with S at most `config.longest`; padding holds any valid id.
            mask: True where a token is real, `[B, S]`; or where a row token may look at a column token,
                `[B, S, S]`, where several texts stand in a row.
            positions: Of the tokens; None counts them from 0.
            added: Added to the embeddings of the tokens before the first norm.
            rate: Share of what layers add that is dropped in training.
            dropout_key: Turns that on.
            remat: What the backward pass recomputes instead of keeping it.

        Returns:
            float32 `[B, S, H]`; padded positions hold numbers without meaning.
        """
        table = self.positions.embedding[...]
        first = self.first_position
        at = table[first : first + tokens.shape[1]] if positions is None else table[first + positions]
        x: Array = self.words(tokens) + at + self.types.embedding[...][0]
        x = self.norm(x if added is None else x + added)
        seen = mask[:, None] if mask.ndim == 2 else mask
        for number, layer in enumerate(self.layers):
            graph, params = nnx.split(layer)
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, number)

            def block(params: Any, x: Array, graph: Any = graph, key: Any = key) -> Array:
                answer: Array = nnx.merge(graph, params)(x, seen, rate=rate, key=key)
                return answer

            x = rematerialised(block, remat)(params, x)
        return x


def pool(hidden: Float[Array, "B S H"], mask: Bool[Array, "B S"], pooling: Pooling) -> Float[Array, "B H"]:
    """One unit-norm embedding per text: the mean over real tokens, or the first token ([CLS])."""
    if pooling == "cls":
        pooled = hidden[:, 0]
    else:
        pooled = jnp.sum(jnp.where(mask[..., None], hidden, 0.0), axis=1)
        pooled = pooled / jnp.maximum(mask.sum(axis=1, keepdims=True), 1).astype(jnp.float32)
    return unit(pooled)


def _gelu(product: Float[Array, "*a I"], bias: Float[Array, " I"]) -> Float[Array, "*a I"]:
    return jax.nn.gelu(product.astype(jnp.float32) + bias, approximate=False)


def _layer_norm(config: BertConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.layer_norm_eps,
        dtype=jnp.float32,
        use_fast_variance=False,  # pretrained activations have outliers, where E[x^2] - E[x]^2 cancels
        rngs=rngs,
    )

"""ModernBERT as a text encoder (Warner et al. 2024, arXiv 2412.13663): token ids in, contextual tokens out.

Pre-norm layers with rotary positions and GeGLU; every third layer sees the whole text, the others a window.
Dropout is for those who ask for it.
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
from prime_jax.nn.attention import attend, split_heads
from prime_jax.nn.encoder_products import FUSED_FROM, Tf32Projection, fused_attention
from prime_jax.nn.linear import Projection, dropout
from prime_jax.nn.remat import Remat, keeping_inputs, rematerialised
from prime_jax.nn.rotary import Rotation, frequencies, rotate


class ModernBertConfig(Frozen):
    """The fields of a `config.json` that decide what a ModernBERT computes; others are ignored."""

    model_config = pydantic.ConfigDict(extra="ignore")

    model_type: Literal["modernbert"]
    vocab_size: int = pydantic.Field(gt=0)
    hidden_size: int = pydantic.Field(gt=0)
    intermediate_size: int = pydantic.Field(gt=0)
    num_hidden_layers: int = pydantic.Field(gt=0)
    num_attention_heads: int = pydantic.Field(gt=0)
    max_position_embeddings: int = pydantic.Field(gt=0)
    norm_eps: float = pydantic.Field(default=1e-5, gt=0)
    hidden_activation: Literal["gelu"] = "gelu"
    norm_bias: Literal[False] = False
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    local_attention: int = pydantic.Field(default=128, gt=0)
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...]
    global_rope_theta: float = pydantic.Field(default=160000.0, gt=1)
    local_rope_theta: float = pydantic.Field(default=10000.0, gt=1)

    @pydantic.model_validator(mode="after")
    def _fields_fit_together(self) -> "ModernBertConfig":
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is no even multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types names {len(self.layer_types)} layers, num_hidden_layers is "
                f"{self.num_hidden_layers}"
            )
        return self

    @property
    def longest(self) -> int:
        """Most tokens of a text."""
        return self.max_position_embeddings

    def told(self) -> str:
        """The fields that count as JSON, for an encoder's identity."""
        return self.model_dump_json()

    @classmethod
    def parse(cls, fields: Any, source: str) -> "ModernBertConfig":
        """Check the content of a `config.json`, of transformers 4 or 5.

        Args:
            fields: The parsed JSON.
            source: Name of the file, for messages.

        Raises:
            DataError: If a field is missing, malformed or not supported; the message names file and field.
        """
        try:
            return cls.model_validate(_in_one_spelling(fields))
        except pydantic.ValidationError as wrong:
            problems = "; ".join(
                f"{'.'.join(map(str, error['loc'])) or 'config'}: {error['msg']}" for error in wrong.errors()
            )
            raise DataError(f"{source}: not a ModernBERT this library can run ({problems})") from None


def _in_one_spelling(fields: dict[str, Any]) -> dict[str, Any]:
    """Transformers 5 lists the layers and keeps RoPE in `rope_parameters`; 4 has a period and two bases."""
    fields = dict(fields)
    if "layer_types" not in fields and isinstance(fields.get("num_hidden_layers"), int):
        every = fields.get("global_attn_every_n_layers", 3)
        kinds = ("full_attention", "sliding_attention")
        fields["layer_types"] = [kinds[bool(layer % every)] for layer in range(fields["num_hidden_layers"])]
    for ours, theirs in (("global_rope_theta", "full_attention"), ("local_rope_theta", "sliding_attention")):
        rope = (fields.get("rope_parameters") or {}).get(theirs)
        if rope is not None:
            fields[ours] = rope.get("rope_theta")
            if rope.get("rope_type", "default") != "default":
                fields[ours] = rope["rope_type"]  # refused by name
    return fields


class _Norm(nnx.Module):
    """LayerNorm without bias, float32."""

    def __init__(self, hidden: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(hidden))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*a H"]) -> Float[Array, "*a H"]:
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + self.epsilon) * self.scale[...]


class ModernBertLayer(nnx.Module):
    """Attention and GeGLU, each after a norm; the first layer has the norm of the embeddings instead."""

    def __init__(
        self,
        config: ModernBertConfig,
        *,
        first: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        tf32: bool,
        fused_to: int,
    ):
        hidden, inner = config.hidden_size, config.intermediate_size
        projection = Tf32Projection if tf32 else Projection
        if not first:
            self.attention_norm = _Norm(hidden, config.norm_eps)
        self.qkv = projection(hidden, 3 * hidden, dtype=dtype, result_dtype=dtype, rngs=rngs)
        self.attention_out = projection(hidden, hidden, dtype=dtype, result_dtype=dtype, rngs=rngs)
        self.mlp_norm = _Norm(hidden, config.norm_eps)
        self.mlp_in = projection(hidden, 2 * inner, dtype=dtype, result_dtype=dtype, rngs=rngs)
        self.mlp_out = projection(inner, hidden, dtype=dtype, result_dtype=dtype, rngs=rngs)
        self.num_heads, self.first, self.dtype = config.num_attention_heads, first, dtype
        self.fused_to = fused_to

    def __call__(
        self,
        x: Float[Array, "B S H"],
        mask: Bool[Array, "B S S"],
        rotation: Rotation,
        *,
        rate: float = 0.0,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B S H"]:
        """Transform the tokens `x`, each looking where the mask allows.

        With a key, `rate` of what attention and MLP add is dropped.
        """
        first, second = (None, None) if key is None else jax.random.split(key)
        normed = x if self.first else keeping_inputs(self.attention_norm, self.dtype, rounded=True)(x)
        parts = (split_heads(part, self.num_heads) for part in jnp.split(self.qkv(normed), 3, axis=-1))
        queries, keys, values = parts
        queries, keys = rotate(queries, rotation), rotate(keys, rotation)
        if self.fused_to and FUSED_FROM <= x.shape[1] <= self.fused_to:
            mixed = fused_attention(queries, keys, values, mask[:, 0].sum(axis=1), self.dtype)
        else:
            mixed = attend(queries, keys, values, mask, self.dtype)
        x = x + dropout(self.attention_out(mixed), rate, first)
        product = self.mlp_in.product(keeping_inputs(self.mlp_norm, self.dtype, rounded=True)(x))
        return x + dropout(
            self.mlp_out(keeping_inputs(_geglu, self.dtype, rounded=True)(product)), rate, second
        )


def _geglu(product: Float[Array, "B S I"]) -> Float[Array, "B S J"]:
    """GELU of the first half times the second, float32."""
    inner, gate = jnp.split(product.astype(jnp.float32), 2, axis=-1)
    return jax.nn.gelu(inner, approximate=False) * gate


class ModernBertModel(nnx.Module):
    """The encoder: word embeddings and their norm, the layers, a last norm.

    Args:
        config: What to build.
        dtype: Compute dtype of the products; they accumulate in float32.
        rngs: Source of the initial weights, which pretrained ones replace.
        tf32: Whether the factors of float32 products of weights may be rounded to TF32.
        fused: Whether texts of some length take `fused_attention` in layers that see all of them; masks must
            then begin with the real tokens.
    """

    def __init__(
        self,
        config: ModernBertConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        tf32: bool = False,
        fused: bool = False,
    ):
        self.words = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.norm = _Norm(config.hidden_size, config.norm_eps)
        self.layers = nnx.List(
            ModernBertLayer(
                config,
                first=number == 0,
                dtype=dtype,
                rngs=rngs,
                tf32=tf32,
                fused_to=fused
                * (config.longest if kind == "full_attention" else config.local_attention // 2),
            )
            for number, kind in enumerate(config.layer_types)
        )
        self.final_norm = _Norm(config.hidden_size, config.norm_eps)
        self.config = config

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
        at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
        apart = jnp.abs(at[:, :, None] - at[:, None, :])
        looked_at = mask[:, None, :] if mask.ndim == 2 else mask
        seen = {
            "full_attention": (
                looked_at & (apart >= 0),
                self._rotation(at, self.config.global_rope_theta),
            ),
            "sliding_attention": (
                looked_at & (apart <= self.config.local_attention // 2),
                self._rotation(at, self.config.local_rope_theta),
            ),
        }
        x = self.words(tokens)
        x = self.norm(x if added is None else x + added)
        for number, (kind, layer) in enumerate(zip(self.config.layer_types, self.layers, strict=True)):
            graph, params = nnx.split(layer)
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, number)

            def block(params: Any, x: Array, graph: Any = graph, kind: str = kind, key: Any = key) -> Array:
                answer: Array = nnx.merge(graph, params)(x, *seen[kind], rate=rate, key=key)
                return answer

            x = rematerialised(block, remat)(params, x)
        return self.final_norm(x)

    def _rotation(self, positions: Int[Array, "B S"], theta: float) -> Rotation:
        size = self.config.hidden_size // self.config.num_attention_heads
        steps = jnp.asarray(frequencies(size, theta, None), jnp.float32)
        angles = positions[..., None].astype(jnp.float32) * steps
        return Rotation(jnp.cos(angles), jnp.sin(angles))

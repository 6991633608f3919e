"""The text predictor in PyTorch, in one file that needs torch and the standard library only.

Every exported bundle of such a model holds it as torch_runtime.py; take it into your own project.

    from torch_runtime import load_bundle, load_tokenizer

    model = load_bundle("bundle/")                  # every file checked against manifest.json, in eval mode
    tokenizer = load_tokenizer("bundle/")           # needs the package tokenizers
    input_ids, attention_mask = tokenizer([["oldest turn", "newest turn"]], ["the query"])
    with torch.inference_mode():
        embedding = model(input_ids, attention_mask)    # [B, T], [B, T] -> [B, E]

It gives the numbers of the JAX model to about 1e-6 and can be trained further (there is no dropout);
`prime_jax.export.from_torch` takes its state_dict back to JAX. All of it but `roles` has the names that
`transformers.AutoModel` gives an encoder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from prime_jax.export.torch_runtime import (
    CheckpointError,
    PredictorError,
    _opened,
    _read_json,
    verify,
)

# Everything above this line is in torch_runtime.py already.

ROLES = 3  # the query, what was said in answer to its author, what its author said
_UNSEEN = -1e30  # added where a token may not look; finite, so that a row that sees nothing stays a number


@dataclass(frozen=True)
class TextConfig:
    """What a text predictor reads and how; the fields of prime_jax that count here.

    Attributes:
        encoder: The fields of a Hugging Face config.json that decide what the encoder computes.
        pooling: `mean` over the real tokens, or `cls`, the first token.
        separator_id: Id of the token between turns.
        max_tokens: Longest sequence.
        max_context_length: Most turns that are read.
        separate_turns: Whether a separator stands between query and turns.
        roles: Whether there is an embedding of who said what.
        lower_case: Whether texts are lower-cased first.
        output_dim: Width E of a prediction, which is the encoder's.
        query_weight: How much of the query's own embedding is added to that of the whole.
    """

    encoder: Mapping[str, Any]
    pooling: str
    separator_id: int
    max_tokens: int
    max_context_length: int
    separate_turns: bool
    roles: bool
    lower_case: bool
    output_dim: int
    query_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.pooling not in ("mean", "cls"):
            raise PredictorError(f"pooling {self.pooling!r} is not mean or cls")
        if (kind := self.encoder["model_type"]) not in KINDS:
            raise PredictorError(f"encoder.model_type {kind!r} is none of {', '.join(KINDS)}")

    @classmethod
    def from_json(cls, path: str | Path) -> "TextConfig":
        """Read the `model` section of a bundle's config.json; settings of the JAX service are left aside.

        Raises:
            CheckpointError: If the file is missing, is not JSON, or does not describe such a model.
        """
        model = _read_json(Path(path)).get("model")
        if not isinstance(model, dict):
            raise CheckpointError(f"{path}: has no section 'model'")
        if model.get("kind") != "text":
            raise CheckpointError(f"{path}: model.kind {model.get('kind')!r} is not text")
        names = [field.name for field in fields(cls)]
        for name in names[: names.index("query_weight")]:  # older bundles do not have it
            if name not in model:
                raise CheckpointError(f"{path}: model.{name} is missing")
        try:
            return cls(**{name: model[name] for name in names if name in model})
        except (TypeError, KeyError, PredictorError) as unfit:
            raise CheckpointError(f"{path}: does not describe a model ({unfit})") from None


class TextPredictor(nn.Module):
    """Predicts the embedding of the passage to retrieve from a conversation's token ids.

    The architectures below are its subclasses: they make contextual tokens, this class what is around them.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        if config.roles:
            self.roles = nn.Parameter(torch.zeros(ROLES, config.output_dim))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Predict the embedding of the passage to retrieve.

        Args:
            input_ids: Token ids as `ConversationTokenizer` makes them, `[B, T]`, any integer type; padding
                behind them holds any valid id.
            attention_mask: Above 0, or True, where a token is real, `[B, T]`.

        Returns:
            Unit-norm predictions, `[B, E]`.

        Raises:
            PredictorError: If a shape or dtype does not fit.
        """
        self._check(input_ids, attention_mask)
        real = attention_mask > 0
        positions = (real.long().cumsum(dim=1) - 1).clamp(min=0)
        separators = (input_ids == self.config.separator_id).long()
        age = separators.cumsum(dim=1) - separators  # texts before a token's own
        added = self.roles[torch.where(age == 0, 0, 2 - age % 2)] if self.config.roles else None

        def embedded(read: Tensor) -> Tensor:
            hidden = self._tokens(input_ids.long(), read, positions, added)
            if self.config.pooling == "cls":
                return functional.normalize(hidden[:, 0], dim=-1)
            summed = hidden.masked_fill(~read[..., None], 0.0).sum(dim=1)
            return functional.normalize(summed / read.sum(dim=1, keepdim=True).clamp(min=1), dim=-1)

        whole = embedded(real)
        if not self.config.query_weight:
            return whole
        return functional.normalize(whole + self.config.query_weight * embedded(real & (age == 0)), dim=-1)

    def get_num_params(self) -> int:
        """Number of trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _tokens(self, ids: Tensor, real: Tensor, positions: Tensor, added: Tensor | None) -> Tensor:
        """Contextual embeddings `[B, T, E]`; `added` goes to the embeddings before the first norm."""
        raise NotImplementedError

    def _check(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        shapes = f"{tuple(input_ids.shape)} and {tuple(attention_mask.shape)}"
        if input_ids.ndim != 2 or input_ids.shape != attention_mask.shape:
            raise PredictorError(f"input_ids and attention_mask must both have shape [B, T], got {shapes}")
        if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            raise PredictorError(f"input_ids is {input_ids.dtype}, expected integers")
        if input_ids.shape[1] > (most := self.config.max_tokens):
            raise PredictorError(f"{input_ids.shape[1]} tokens, the model reads at most {most}")


def _attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int, unseen: Tensor) -> Tensor:
    """Attention of `[B, T, H]` each, with `unseen` added to the logits, `[B, 1 or T, T]`."""
    queries, keys, values = (_by_head(part, heads).transpose(1, 2) for part in (queries, keys, values))
    mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=unseen[:, None])
    return mixed.transpose(1, 2).flatten(2)


def _by_head(x: Tensor, heads: int) -> Tensor:
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads)


def _unseen(seen: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(seen, dtype=like.dtype).masked_fill(~seen, _UNSEEN)


class BertLayer(nn.Module):
    """Self-attention and MLP, each followed by its residual and LayerNorm."""

    def __init__(self, encoder: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, inner = encoder["hidden_size"], encoder["intermediate_size"]
        self.heads = encoder["num_attention_heads"]

        def closed(inputs: int) -> nn.ModuleDict:
            norm = nn.LayerNorm(hidden, eps=encoder["layer_norm_eps"])
            return nn.ModuleDict({"dense": nn.Linear(inputs, hidden), "LayerNorm": norm})

        parts = nn.ModuleDict({name: nn.Linear(hidden, hidden) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"self": parts, "output": closed(hidden)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(hidden, inner)})
        self.output = closed(inner)

    def forward(self, x: Tensor, unseen: Tensor) -> Tensor:
        """Transform the tokens `x`, `[B, T, H]`."""
        parts: Any = self.attention["self"]
        out: Any = self.attention["output"]
        mixed = _attend(parts["query"](x), parts["key"](x), parts["value"](x), self.heads, unseen)
        x = out["LayerNorm"](x + out["dense"](mixed))
        inner = functional.gelu(self.intermediate["dense"](x))
        answer: Tensor = self.output["LayerNorm"](x + self.output["dense"](inner))
        return answer


class BertTextPredictor(TextPredictor):
    """With a BERT, RoBERTa or XLM-R encoder."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        encoder, hidden = config.encoder, config.output_dim
        tables = {
            "word_embeddings": encoder["vocab_size"],
            "position_embeddings": encoder["max_position_embeddings"],
            "token_type_embeddings": encoder["type_vocab_size"],
        }
        self.embeddings = nn.ModuleDict({name: nn.Embedding(size, hidden) for name, size in tables.items()})
        self.embeddings["LayerNorm"] = nn.LayerNorm(hidden, eps=encoder["layer_norm_eps"])
        layers = nn.ModuleList(BertLayer(encoder) for _ in range(encoder["num_hidden_layers"]))
        self.encoder = nn.ModuleDict({"layer": layers})
        self.first = 0 if encoder["model_type"] == "bert" else encoder["pad_token_id"] + 1

    def _tokens(self, ids: Tensor, real: Tensor, positions: Tensor, added: Tensor | None) -> Tensor:
        x = self.embeddings["word_embeddings"](ids)
        x = x + self.embeddings["position_embeddings"](positions + self.first)
        x = x + self.embeddings["token_type_embeddings"](torch.zeros_like(ids))
        x = self.embeddings["LayerNorm"](x if added is None else x + added)
        unseen = _unseen(real[:, None], x)
        layers: Any = self.encoder["layer"]
        for layer in layers:
            x = layer(x, unseen)
        answer: Tensor = x
        return answer


class ModernBertLayer(nn.Module):
    """Attention and GeGLU, each after a norm; the first layer has the norm of the embeddings instead."""

    def __init__(self, encoder: Mapping[str, Any], first: bool) -> None:
        super().__init__()
        hidden, inner = encoder["hidden_size"], encoder["intermediate_size"]
        self.heads = encoder["num_attention_heads"]

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False)

        if not first:
            self.attn_norm = nn.LayerNorm(hidden, eps=encoder["norm_eps"], bias=False)
        self.attn = nn.ModuleDict({"Wqkv": linear(hidden, 3 * hidden), "Wo": linear(hidden, hidden)})
        self.mlp_norm = nn.LayerNorm(hidden, eps=encoder["norm_eps"], bias=False)
        self.mlp = nn.ModuleDict({"Wi": linear(hidden, 2 * inner), "Wo": linear(inner, hidden)})

    def forward(self, x: Tensor, unseen: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Transform the tokens `x`, `[B, T, H]`, positions given as angles `[B, T, 1, head_dim / 2]`."""
        normed = self.attn_norm(x) if hasattr(self, "attn_norm") else x
        queries, keys, values = self.attn["Wqkv"](normed).chunk(3, dim=-1)
        queries, keys = (_rotated(part, self.heads, cos, sin) for part in (queries, keys))
        x = x + self.attn["Wo"](_attend(queries, keys, values, self.heads, unseen))
        inner, gate = self.mlp["Wi"](self.mlp_norm(x)).chunk(2, dim=-1)
        answer: Tensor = x + self.mlp["Wo"](functional.gelu(inner) * gate)
        return answer


def _rotated(x: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """Dimension i of every head turned together with dimension i + head_dim / 2."""
    first, second = _by_head(x, heads).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(2)


class ModernBertTextPredictor(TextPredictor):
    """With a ModernBERT encoder."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        encoder, hidden = config.encoder, config.output_dim
        self.embeddings = nn.ModuleDict({"tok_embeddings": nn.Embedding(encoder["vocab_size"], hidden)})
        self.embeddings["norm"] = nn.LayerNorm(hidden, eps=encoder["norm_eps"], bias=False)
        kinds = encoder["layer_types"]
        self.layers = nn.ModuleList(ModernBertLayer(encoder, number == 0) for number in range(len(kinds)))
        self.final_norm = nn.LayerNorm(hidden, eps=encoder["norm_eps"], bias=False)

    def _tokens(self, ids: Tensor, real: Tensor, positions: Tensor, added: Tensor | None) -> Tensor:
        encoder = self.config.encoder
        x = self.embeddings["tok_embeddings"](ids)
        x = self.embeddings["norm"](x if added is None else x + added)
        apart = (positions[:, :, None] - positions[:, None, :]).abs()
        near = apart <= encoder["local_attention"] // 2
        given = {
            "full_attention": (_unseen(real[:, None], x), *self._angles(positions, "global_rope_theta")),
            "sliding_attention": (
                _unseen(real[:, None] & near, x),
                *self._angles(positions, "local_rope_theta"),
            ),
        }
        for kind, layer in zip(encoder["layer_types"], self.layers, strict=True):
            x = layer(x, *given[kind])
        answer: Tensor = self.final_norm(x)
        return answer

    def _angles(self, positions: Tensor, theta: str) -> tuple[Tensor, Tensor]:
        size = self.config.output_dim // self.config.encoder["num_attention_heads"]
        steps = [self.config.encoder[theta] ** (-pair / size) for pair in range(0, size, 2)]
        dtype = self.final_norm.weight.dtype
        angles = positions[..., None] * torch.tensor(steps, dtype=torch.float32, device=positions.device)
        return angles.cos()[:, :, None].to(dtype), angles.sin()[:, :, None].to(dtype)


KINDS: dict[str, type[TextPredictor]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), BertTextPredictor),
    "modernbert": ModernBertTextPredictor,
}


def load_bundle(folder: str | Path) -> TextPredictor:
    """Open an exported bundle: verify every file, then build the model, in eval mode.

    Raises:
        CheckpointError: If a file is missing, damaged or does not fit; the message names it.
    """
    model: TextPredictor = _opened(
        folder, TextConfig, lambda config: KINDS[config.encoder["model_type"]](config)
    )
    return model


class ConversationTokenizer:
    """Makes token ids of conversations, as in training.

    Special tokens that a text spells out, such as "[SEP]", are read as ordinary characters.

    Args:
        file: The bundle's tokenizer.json.
        config: Of the model.
        query_prefix: Stands before every query.

    Raises:
        CheckpointError: If the file cannot be read, or separates texts by another token than the model.
    """

    def __init__(self, file: str | Path, config: TextConfig, query_prefix: str = "") -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as broken:  # the library raises nothing more special
            raise CheckpointError(f"{file}: not a readable tokenizer ({broken})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        frame = self._tokenizer.encode("").ids
        if len(frame) != 2 or frame[1] != config.separator_id:
            raise CheckpointError(
                f"{file}: frames texts by {frame}, the model reads {config.separator_id} last"
            )
        self._tokenizer.encode_special_tokens = True
        self._start, self._config, self._prefix = frame[0], config, query_prefix

    def __call__(self, contexts: Sequence[Sequence[str]], queries: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask of conversations, int64 `[B, T]` each, T that of the longest.

        Args:
            contexts: The turns of each, oldest first; the newest `max_context_length` are read.
            queries: The query of each.
        """
        rows = [self._joined(*given) for given in zip(contexts, queries, strict=True)]
        width = max(map(len, rows), default=0)
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int64)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        mask = torch.arange(width) < lengths[:, None]
        return ids.reshape(len(rows), width), mask.long()

    def _joined(self, turns: Sequence[str], query: str) -> list[int]:
        config, separator = self._config, [self._config.separator_id] * self._config.separate_turns
        ids = [self._start, *self._pieces(self._prefix + query)]
        for turn in list(turns)[: -config.max_context_length - 1 : -1]:
            ids += [*separator, *self._pieces(turn)]
        return [*ids[: config.max_tokens - 1], config.separator_id]

    def _pieces(self, text: str) -> list[int]:
        text = text.lower() if self._config.lower_case else text
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def load_tokenizer(folder: str | Path) -> ConversationTokenizer:
    """What makes token ids for a bundle's model; needs the package `tokenizers`.

    Raises:
        CheckpointError: If a file is missing or damaged; the message names it.
    """
    folder = Path(folder)
    verify(folder)
    settings = _read_json(folder / "config.json")
    config = TextConfig.from_json(folder / "config.json")
    return ConversationTokenizer(folder / "tokenizer.json", config, settings.get("query_prefix", ""))

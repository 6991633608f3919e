"""The embedding predictor in PyTorch, in one file that needs torch and the standard library only.

A copy of this file lies in every exported bundle; take it into your own project.

    from torch_runtime import load_bundle

    model = load_bundle("bundle/")                  # every file checked against manifest.json, in eval mode
    with torch.inference_mode():
        embedding = model(context, query, context_mask)    # [B, N, D], [B, D], [B, N] -> [B, E]

It gives the numbers of the JAX model to about 1e-6 and can be trained further: `model.train()`, then
`model.save_checkpoint("tuned.pt")`; `prime_jax.export.from_torch` takes that back to JAX.
"""

import ctypes
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

FORMATS = (1, 2)  # versions of manifest.json that this file reads
_DTYPES = {"F32": torch.float32, "I32": torch.int32, "BOOL": torch.bool}
_RESIDUALS = ("none", "query", "copy", "linear")
_CHOICES = {"context_attention": ("full", "prefix", "causal"), "residual": _RESIDUALS}


class PredictorError(Exception):
    """Root of all errors raised here on purpose; also raised for inputs of a wrong shape or dtype."""


class CheckpointError(PredictorError):
    """A bundle is missing, incomplete, damaged or of another version; the message names the file."""


@dataclass(frozen=True)
class PredictorConfig:
    """Shape and behaviour of an `EmbeddingPredictor`; the fields and defaults of prime_jax."""

    input_dim: int = 1024
    hidden_dim: int = 2048
    output_dim: int = 1024
    num_layers: int = 4
    num_heads: int = 8
    max_context_length: int = 10
    dropout: float = 0.1
    context_attention: str = "full"
    residual: str = "none"
    max_delta: float | None = None
    block: str = "gelu"
    num_kv_heads: int | None = None  # this and what follows: of llama layers
    head_dim: int | None = None
    mlp_dim: int | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, known in {**_CHOICES, "block": tuple(BLOCKS)}.items():
            if (given := getattr(self, name)) not in known:
                raise PredictorError(f"{name} {given!r} is none of {', '.join(known)}")
        if self.head_dim is None and self.hidden_dim % self.num_heads:
            raise PredictorError(f"hidden_dim {self.hidden_dim} is not divisible by {self.num_heads} heads")

    @classmethod
    def from_json(cls, path: str | Path) -> "PredictorConfig":
        """Read the `model` section of a bundle's config.json; settings of the JAX service are left aside.

        Raises:
            CheckpointError: If the file is missing, is not JSON, or lacks a field.
        """
        model = _read_json(Path(path)).get("model")
        if not isinstance(model, dict):
            raise CheckpointError(f"{path}: has no section 'model'")
        return cls.from_dict(model, path)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], path: str | Path) -> "PredictorConfig":
        """The config that `values` describe; `path` is where they were found, for the message.

        Raises:
            CheckpointError: If a field is missing.
        """
        names = [field.name for field in fields(cls)]
        for name in names[: names.index("block")]:  # older bundles say nothing of the layers
            if name not in values:
                raise CheckpointError(f"{path}: model.{name} is missing")
        try:
            return cls(**{name: values[name] for name in names if name in values})
        except (TypeError, ZeroDivisionError) as unfit:
            raise CheckpointError(f"{path}: does not describe a model ({unfit})") from None


class PredictorTransformerBlock(nn.Module):
    """Pre-norm block: `x + attention(norm1(x))`, then `x + mlp(norm2(x))` with an exact GELU, 4 H wide."""

    def __init__(self, hidden_dim: int, num_heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(hidden_dim, num_heads, dropout=dropout, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_dim, 4 * hidden_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * hidden_dim, hidden_dim),
            nn.Dropout(dropout),
        )
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.norm2 = nn.LayerNorm(hidden_dim)

    def forward(self, x: Tensor, blocked: Tensor, rows: int | None = None) -> Tensor:
        """Transform the first `rows` tokens (None: all), letting them look at every token not blocked.

        Args:
            x: Tokens, `[B, S, H]`.
            blocked: True where a row token may not look at a column token, `[B * heads, S, S]`.
            rows: How many leading tokens to compute; the last layer needs only [PRED].
        """
        normed = self.norm1(x)
        attended, _ = self.attention(
            normed[:, :rows], normed, normed, attn_mask=blocked[:, :rows], need_weights=False
        )
        x = x[:, :rows] + attended
        answer: Tensor = x + self.mlp(self.norm2(x))
        return answer


# Layers and final norm by the config's `block`; a bundle whose layers are others adds them below.
BLOCKS: dict[str, tuple[Callable[[PredictorConfig], nn.Module], Callable[[PredictorConfig], nn.Module]]] = {
    "gelu": (
        lambda config: PredictorTransformerBlock(config.hidden_dim, config.num_heads, config.dropout),
        lambda config: nn.LayerNorm(config.hidden_dim),
    )
}


class EmbeddingPredictor(nn.Module):
    """Predicts the embedding of the passage to retrieve from the turns so far and the query.

    The sequence `[PRED], turns, query` goes through the blocks; [PRED]'s answer, projected and normalised, is
    the prediction, added to the query (and a learned mix of the turns) where the config has a residual.
    """

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        hidden = config.hidden_dim
        self.config = config
        self.context_proj = nn.Linear(config.input_dim, hidden)
        self.query_proj = nn.Linear(config.input_dim, hidden)
        self.output_proj = nn.Linear(hidden, config.output_dim)
        self.pred_token = nn.Parameter(0.02 * torch.randn(1, 1, hidden))
        if config.block == "gelu":
            self.pos_embedding = nn.Parameter(0.02 * torch.randn(1, config.max_context_length + 2, hidden))
        layer, norm = BLOCKS[config.block]
        self.layers = nn.ModuleList(layer(config) for _ in range(config.num_layers))
        self.norm = norm(config)
        if config.residual != "none":
            self.residual_gate = nn.Parameter(torch.zeros(()))
        if config.residual in ("copy", "linear"):
            mix = 0.5 * 0.7 ** torch.arange(config.max_context_length, dtype=torch.float32)
            self.copy_age = nn.Parameter(mix.expm1().log())  # softplus of it is the recency mix
            self.copy_content = nn.Parameter(torch.zeros(hidden))
        if config.residual == "linear":
            self.linear_map = nn.Linear(2 * config.input_dim, config.output_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if config.residual == "linear":
            nn.init.zeros_(self.linear_map.weight)

    def forward(self, context: Tensor, query: Tensor, context_mask: Tensor | None = None) -> Tensor:
        """Predict the embedding of the passage to retrieve.

        Args:
            context: Turn embeddings, oldest first, `[B, N, D]`; N from 0 to max_context_length, B from 0.
            query: Query embeddings, `[B, D]`.
            context_mask: Bool, True where a turn is real, `[B, N]`; None means all are. What stands in a
                padded slot has no influence.

        Returns:
            Unit-norm predictions, `[B, E]`.

        Raises:
            PredictorError: If a shape or dtype does not fit.
        """
        check_inputs(self.config, context, query, context_mask)
        if context_mask is None:
            context_mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        dtype = self.pred_token.dtype
        context = context.to(dtype).masked_fill(~context_mask[..., None], 0.0)
        query = query.to(dtype)
        if query.shape[0] == 0:  # torch's attention cannot reshape no rows
            empty: Tensor = self.output_proj(self.query_proj(query))
            return empty
        pred = self.pred_token.expand(query.shape[0], -1, -1)
        x = torch.cat([pred, self.context_proj(context), self.query_proj(query)[:, None]], dim=1)
        positions = _positions(context_mask)
        given = [_blocked(context_mask, self.config.context_attention)]
        if self.config.block == "gelu":
            x = x + self.pos_embedding[0][positions]
            given[0] = given[0].repeat_interleave(self.config.num_heads, dim=0)
        else:
            given.append(positions)
        for layer in self.layers[:-1]:
            x = layer(x, *given)
        turns = x[:, 1:-1]
        x = self.layers[-1](x, *given, rows=1)
        delta = self.output_proj(self.norm(x[:, 0]))
        if self.config.residual != "none":
            base, delta = self._mixed(context, query, context_mask, turns), self.residual_gate * delta
            if self.config.residual == "linear":
                both = torch.cat([query, base - query], dim=1)
                delta = delta + self.linear_map(functional.dropout(both, self.config.dropout, self.training))
            delta = base + self._capped(delta)
        return functional.normalize(delta, dim=-1)

    def get_num_params(self) -> int:
        """Number of trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    def save_checkpoint(self, path: str | Path) -> None:
        """Write config and weights to a `.pt` file that `load_checkpoint` and `prime_jax` open.

        The file takes its name only when it is complete.

        Raises:
            CheckpointError: If it cannot be written.
        """
        path = Path(path)
        part = path.with_name(f".{path.name}.part")
        weights = {name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}
        config = asdict(self.config)
        saved = {"config": config, "state_dict": weights, "sha256": _digest(config, weights)}
        try:
            with part.open("wb") as stream:
                torch.save(saved, stream)
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(path)
        except (OSError, RuntimeError) as failed:  # torch reports a full disk as RuntimeError
            part.unlink(missing_ok=True)
            raise CheckpointError(f"{path}: cannot be written ({failed})") from None

    @classmethod
    def load_checkpoint(cls, path: str | Path) -> "EmbeddingPredictor":
        """Open what `save_checkpoint` wrote, in eval mode. Nothing in the file is executed.

        Raises:
            CheckpointError: If the file is missing, damaged, holds anything but tensors, numbers and text,
                or does not fit; the message names it.
        """
        saved = read_pt(path)
        config, weights = saved.get("config"), saved.get("state_dict")
        plain = isinstance(config, dict) and not any(isinstance(fact, Tensor) for fact in config.values())
        named = isinstance(weights, dict) and all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in weights.items()
        )
        if config is None or weights is None or not plain or not named:
            raise CheckpointError(f"{path}: not written by save_checkpoint: it lacks config or state_dict")
        if saved.get("sha256") != _digest(config, weights):
            raise CheckpointError(f"{path}: damaged or changed, it differs from its SHA-256")
        whole = {
            name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in weights.items()
        }
        shape = PredictorConfig.from_dict(config, path)
        model: EmbeddingPredictor = _with_weights(EmbeddingPredictor, shape, whole, path)
        return model

    def _mixed(self, context: Tensor, query: Tensor, context_mask: Tensor, turns: Tensor) -> Tensor:
        """What the prediction is added to: the query, or query plus a learned mix of the turns, `[B, D]`."""
        if self.config.residual == "query":
            return query
        age = context_mask.sum(dim=1, keepdim=True) - context_mask.cumsum(dim=1)
        age = age.clamp(max=self.config.max_context_length - 1)  # only a padded slot can be older
        logits = self.copy_age[age] + turns @ self.copy_content
        weights = functional.softplus(logits).masked_fill(~context_mask, 0.0)
        return query + torch.einsum("bn,bnd->bd", weights, context)

    def _capped(self, delta: Tensor) -> Tensor:
        if self.config.max_delta is None:
            return delta
        norm: Tensor = torch.linalg.vector_norm(delta, dim=-1, keepdim=True)
        return delta * (self.config.max_delta * norm.clamp(min=1e-12).reciprocal()).clamp(max=1.0)


def check_inputs(config: Any, context: Tensor, query: Tensor, context_mask: Tensor | None) -> None:
    """Refuse embeddings whose shape or dtype a model of this config does not take (`PredictorError`)."""
    turns, asked = tuple(context.shape), tuple(query.shape)
    if context.ndim != 3 or query.ndim != 2:
        raise PredictorError(f"context, query must have shape [B, N, D], [B, D], got {turns}, {asked}")
    if not (context.is_floating_point() and query.is_floating_point()):
        found = f"context is {context.dtype} and query {query.dtype}"
        raise PredictorError(f"{found}, expected floating-point embeddings")
    if turns[2] != config.input_dim:
        raise PredictorError(f"context has dimension {turns[2]}, the model takes {config.input_dim}")
    if asked != (turns[0], config.input_dim):
        fitting = (turns[0], config.input_dim)
        raise PredictorError(f"query has shape {asked}, expected {fitting} to go with the context")
    if turns[1] > (most := config.max_context_length):
        raise PredictorError(f"{turns[1]} turns, the model takes at most {most}; pass the newest ones")
    if context_mask is not None and (context_mask.shape != turns[:2] or context_mask.dtype != torch.bool):
        found = f"{context_mask.dtype} {tuple(context_mask.shape)}"
        raise PredictorError(f"context_mask is {found}, expected torch.bool {turns[:2]}")


def _positions(context_mask: Tensor) -> Tensor:
    """Position of every token, `[B, S]`: [PRED] 0, the k-th real turn k, the query after the last of them."""
    turns = context_mask.cumsum(dim=1) * context_mask
    query = context_mask.sum(dim=1, keepdim=True) + 1
    return torch.cat([torch.zeros_like(query), turns, query], dim=1)


def _blocked(context_mask: Tensor, mode: str) -> Tensor:
    """True where the row token may not look at the column token, `[B, S, S]`.

    Nobody looks at padding. `prefix`: turns see turns only; `causal`: a turn sees the turns up to itself.
    A padded slot sees itself, so that no row of the softmax is empty; nothing looks at it.
    """
    real = functional.pad(context_mask, (1, 1), value=True)
    size = real.shape[1]
    allowed = torch.ones(size, size, dtype=torch.bool, device=real.device)
    if mode != "full":
        allowed[1:-1, 0] = False
        allowed[1:-1, -1] = False
    if mode == "causal":
        allowed[1:-1, 1:-1] = allowed[1:-1, 1:-1].tril()
    itself = torch.eye(size, dtype=torch.bool, device=real.device)
    return ~((allowed & real[:, None, :]) | itself)


def load_bundle(folder: str | Path) -> EmbeddingPredictor:
    """Open an exported bundle: verify every file, then build the model, in eval mode.

    Raises:
        CheckpointError: If a file is missing, damaged or does not fit; the message names it.
    """
    model: EmbeddingPredictor = _opened(folder, PredictorConfig, EmbeddingPredictor)
    return model


def _opened(folder: str | Path, config: Any, make: Callable[[Any], nn.Module]) -> Any:
    """A bundle's model: every file verified, `make` called with the config, in eval mode."""
    verify(folder)
    weights, shape = Path(folder) / "model.safetensors", config.from_json(Path(folder) / "config.json")
    return _with_weights(make, shape, read_safetensors(weights), weights)


def _with_weights(make: Any, config: Any, tensors: Mapping[str, Tensor], path: str | Path) -> Any:
    """A module of that kind with these weights, in eval mode; a weight that does not fit is named."""
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        model = make(config)
    expected = model.state_dict()
    for name in sorted(expected.keys() ^ tensors.keys()):
        raise CheckpointError(f"{path}: tensor {name!r} is {'missing' if name in expected else 'unexpected'}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or tensor.dtype != torch.float32:
            raise CheckpointError(
                f"{path}: tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"expected torch.float32 {tuple(expected[name].shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: tensor {name!r} holds NaN or Inf")
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval()


def _digest(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the config and every tensor's name, type, shape and values."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous()
        size = values.numel() * values.element_size()
        digest.update((ctypes.c_char * size).from_address(values.data_ptr()))
    return digest.hexdigest()


def verify(folder: str | Path) -> dict[str, Any]:
    """Check the size and SHA-256 of every file of a bundle against its manifest.json, and return that.

    Raises:
        CheckpointError: If the manifest is not a bundle's, names a path outside the folder, or a file is
            missing, a link, or differs; the message names the file.
    """
    folder = Path(folder)
    manifest = _read_json(folder / "manifest.json")
    where, files = folder / "manifest.json", manifest.get("files")
    if manifest.get("kind") != "bundle" or not isinstance(files, dict):
        raise CheckpointError(f"{where}: not the manifest of a bundle")
    if (version := manifest.get("format_version")) not in FORMATS:
        raise CheckpointError(f"{where}: format version {version!r}, this code reads {FORMATS}")
    as_written = where.read_text("utf-8") == json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    rest = {name: fact for name, fact in manifest.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    if not as_written or manifest.get("sha256") != digest:
        raise CheckpointError(f"{where}: damaged or changed, it differs from its own SHA-256")
    for name in ("config.json", "model.safetensors"):
        if name not in files:
            raise CheckpointError(f"{where}: does not list {name}")
    inside = Path(globals().get("__file__", "/-")).resolve().parent == folder.resolve()
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():  # what a folder's link leads to would not be looked at
            raise CheckpointError(f"{path}: a link; a bundle holds its files itself")
        own = inside and name.startswith("__pycache__/torch_runtime.")  # what Python made of this file
        if path.is_file() and not own and name not in (*files, "manifest.json", "model.sig"):
            why = "delete it, import with python -B" if ".pyc" in path.name else "the bundle was changed"
            raise CheckpointError(f"{path}: not listed in manifest.json; {why}")
    for name, facts in files.items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name:
            raise CheckpointError(f"{where}: the path {name!r} leaves the folder")
        if not file.is_file():
            raise CheckpointError(f"{file}: listed in manifest.json but missing")
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if facts != {"bytes": file.stat().st_size, "sha256": digest}:
            raise CheckpointError(f"{file}: damaged or changed, it differs from manifest.json")
    return manifest


def read_pt(path: str | Path) -> dict[str, Any]:
    """Read a `.pt` file of tensors, numbers and text by name; a file that holds code is refused unopened.

    Raises:
        CheckpointError: If the file is missing, damaged, or holds anything else; the message names it.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as unreadable:
        raise CheckpointError(f"{path}: cannot be read ({unreadable.strerror})") from None
    except Exception as broken:  # torch raises many kinds for a damaged file
        if type(broken).__name__ == "UnpicklingError":
            raise CheckpointError(f"{path}: holds more than tensors, numbers and text; not opened") from None
        raise CheckpointError(f"{path}: damaged, not a file of torch.save ({broken})") from None
    if not isinstance(saved, dict):
        raise CheckpointError(f"{path}: holds {type(saved).__name__}, not tensors by name")
    return saved


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file of float32, int32 and bool tensors; nothing in it is ever executed.

    The tensors share one buffer that they own together.

    Raises:
        CheckpointError: If the header is not what the format asks for, or does not fit the file's length.
    """
    path = Path(path)
    try:
        data = bytearray(path.read_bytes())
    except OSError as unreadable:
        raise CheckpointError(f"{path}: cannot be read ({unreadable.strerror})") from None
    start = 8 + int.from_bytes(data[:8], "little")
    if len(data) < 8 or start > len(data):
        raise CheckpointError(f"{path}: damaged, its header is longer than the file")
    try:
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        end = start
        tensors = {}
        for name, entry in entries:
            dtype, shape = _DTYPES[entry["dtype"]], [int(size) for size in entry["shape"]]
            first, last = (start + int(offset) for offset in entry["data_offsets"])
            count = math.prod(shape)
            if min(shape, default=0) < 0 or first != end or last - first != count * dtype.itemsize:
                raise ValueError(f"tensor {name!r} does not lie where it should")
            if last > len(data):
                raise ValueError(f"tensor {name!r} ends after the file")
            flat = torch.frombuffer(data, dtype=dtype, count=count, offset=first) if count else torch.empty(0)
            tensors[name] = flat.to(dtype).reshape(shape)
            end = last
        if end != len(data):
            raise ValueError("bytes that belong to no tensor")
    except (ValueError, KeyError, TypeError, AttributeError) as broken:
        raise CheckpointError(f"{path}: damaged, not a safetensors file we can read ({broken})") from None
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing") from None
    except OSError as unreadable:
        raise CheckpointError(f"{path}: cannot be read ({unreadable.strerror})") from None
    except (ValueError, RecursionError) as broken:
        raise CheckpointError(f"{path}: not valid JSON ({broken})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value

"""JASPER's predictors in PyTorch, in one file that needs torch and the standard library only.

Every exported bundle of such a model holds it as torch_runtime.py; take it into your own project.

    from torch_runtime import load_bundle

    model = load_bundle("bundle/")                  # every file checked against manifest.json, in eval mode
    embedding = model.predict(question, steering)   # [B, D], [B, D] -> [B, E]; without steering: None
    found = model.explain(question, steering)       # with subspaces: also routing, coarse and fine

`model(context, query, context_mask)` is the call of all predictors: the steering vector is the one turn of
the context. It gives the numbers of the JAX model to about 1e-6 and can be trained further, but subspaces are
chosen without noise; `prime_jax.export.from_torch` takes its state_dict back to JAX.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

FORMATS = (1, 2)  # versions of manifest.json that this file reads
_DTYPES = {"F32": torch.float32, "I32": torch.int32, "BOOL": torch.bool}
_CHOICES = {"residual": ("none", "query"), "routing": ("softmax", "argmax"), "fine_input": ("concat", "add")}


class PredictorError(Exception):
    """Root of all errors raised here on purpose; also raised for inputs of a wrong shape or dtype."""


class CheckpointError(PredictorError):
    """A bundle is missing, incomplete, damaged or of another version; the message names the file."""


class Prediction(NamedTuple):
    """What a model answers; all but `embedding` are None without subspaces.

    Attributes:
        embedding: Unit-norm predictions, `[B, E]`.
        logits: Of the router over K subspaces, `[B, K]`.
        routing: Weights of the subspaces, `[B, K]`; rows sum to 1.
        coarse: Mix of the centroids by these weights, `[B, E]`.
        fine: What leads from there to the prediction, `[B, E]`: `embedding == coarse + fine`. Its norm, the
            atypicality, says how far the prediction is from what the chosen clusters stand for.
    """

    embedding: Tensor
    logits: Tensor | None = None
    routing: Tensor | None = None
    coarse: Tensor | None = None
    fine: Tensor | None = None


@dataclass(frozen=True)
class JasperConfig:
    """Shape and behaviour of a `JasperPredictor`; the fields and defaults of prime_jax."""

    input_dim: int = 384
    hidden_dim: int = 512
    output_dim: int = 384
    num_layers: int = 2
    dropout: float = 0.1
    residual: str = "none"
    max_delta: float | None = None

    def __post_init__(self) -> None:
        for name in ("input_dim", "hidden_dim", "output_dim", "num_layers", "num_subspaces"):
            if type(size := getattr(self, name, 1)) is not int or size < 1:
                raise PredictorError(f"{name} {size!r} is not a whole number above 0")
        for name, known in _CHOICES.items():
            if (given := getattr(self, name, known[0])) not in known:
                raise PredictorError(f"{name} {given!r} is not {' or '.join(known)}")
        one_space = self.residual == "query" or isinstance(self, SubspaceConfig)
        if one_space and self.input_dim != self.output_dim:
            raise PredictorError(f"input_dim {self.input_dim} must equal output_dim {self.output_dim}")


@dataclass(frozen=True)
class SubspaceConfig(JasperConfig):
    """Shape and behaviour of a `DecomposedJasperPredictor`."""

    num_subspaces: int = 32
    routing: str = "softmax"
    fine_input: str = "concat"


class MLP(nn.Module):
    """Blocks of Linear, exact GELU, LayerNorm and dropout, each `width` wide."""

    def __init__(self, inputs: int, width: int, blocks: int, dropout: float = 0.1) -> None:
        super().__init__()
        sizes = [inputs] + [width] * (blocks - 1)
        self.linears = nn.ModuleList(nn.Linear(size, width) for size in sizes)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in sizes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map the last axis."""
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = self.dropout(norm(functional.gelu(linear(x))))
        return x


class JasperPredictor(nn.Module):
    """Predicts the embedding of the source to retrieve from a question and a steering vector."""

    config: JasperConfig

    def __init__(self, config: JasperConfig) -> None:
        super().__init__()
        hidden, blocks, rate = config.hidden_dim, config.num_layers, config.dropout
        self.config = config
        self.question_encoder = MLP(config.input_dim, hidden, blocks, rate)
        self.steering_encoder = MLP(config.input_dim, hidden, blocks, rate)
        self.head = MLP(self._read() * hidden, hidden, blocks, rate)
        self.output_proj = nn.Linear(hidden, config.output_dim)
        if config.residual == "query":
            self.residual_gate = nn.Parameter(torch.zeros(()))

    def forward(self, context: Tensor, query: Tensor, context_mask: Tensor | None = None) -> Tensor:
        """Predict the embedding of the source to retrieve.

        Args:
            context: The steering vector as the one turn, `[B, 1, D]`; or no turn, `[B, 0, D]`.
            query: Question embeddings, `[B, D]`.
            context_mask: Bool, False where a row has no steering, `[B, 1]`; None means all have. What stands
                in a masked slot has no influence.

        Returns:
            Unit-norm predictions, `[B, E]`.

        Raises:
            PredictorError: If a shape or dtype does not fit.
        """
        return self.details(context, query, context_mask).embedding

    def details(self, context: Tensor, query: Tensor, context_mask: Tensor | None = None) -> Prediction:
        """The prediction with all that the model says about it; see `forward`."""
        self._check(context, query, context_mask)
        question = query.to(self.output_proj.weight.dtype)
        steering = torch.zeros_like(question)
        if context.shape[1]:
            steering = context[:, 0].to(question.dtype)
            if context_mask is not None:
                steering = steering.masked_fill(~context_mask, 0.0)
        return self._predict(question, steering)

    def predict(self, question: Tensor, steering: Tensor | None = None) -> Tensor:
        """Predict without gradients.

        Args:
            question: Question embeddings, `[B, D]`.
            steering: Steering vectors, `[B, D]`; None, or a row of zeros, steers nowhere.

        Returns:
            Unit-norm predictions, `[B, E]`.

        Raises:
            PredictorError: If a shape or dtype does not fit.
        """
        return self.explain(question, steering).embedding

    def explain(self, question: Tensor, steering: Tensor | None = None) -> Prediction:
        """As `predict`, with routing, coarse and fine part where the model has subspaces."""
        steering = torch.zeros_like(question) if steering is None else steering
        if not question.ndim == steering.ndim == 2:
            shapes = f"{tuple(question.shape)} and {tuple(steering.shape)}"
            raise PredictorError(f"question and steering must have shape [B, D], got {shapes}")
        with torch.inference_mode():
            return self.details(steering[:, None], question)

    def get_num_params(self) -> int:
        """Number of trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _read(self) -> int:
        """How many encoded vectors the head reads side by side."""
        return 2

    def _predict(self, question: Tensor, steering: Tensor) -> Prediction:
        read = [self.question_encoder(question), self.steering_encoder(steering)]
        delta = self.output_proj(self.head(torch.cat(read, dim=-1)))
        if self.config.residual == "query":
            delta = question + self._capped(self.residual_gate * delta)
        return Prediction(functional.normalize(delta, dim=-1))

    def _capped(self, delta: Tensor) -> Tensor:
        if self.config.max_delta is None:
            return delta
        norm: Tensor = torch.linalg.vector_norm(delta, dim=-1, keepdim=True)
        return delta * (self.config.max_delta * norm.clamp(min=1e-12).reciprocal()).clamp(max=1.0)

    def _check(self, context: Tensor, query: Tensor, context_mask: Tensor | None) -> None:
        size, shapes = self.config.input_dim, f"{tuple(context.shape)} and {tuple(query.shape)}"
        fits = context.ndim == 3 and context.shape[1] <= 1 and context.shape[2] == size
        if not fits or query.shape != (context.shape[0], size):
            raise PredictorError(
                f"context must be one steering vector, [B, 1, {size}], and query [B, {size}], got {shapes}"
            )
        if not (context.is_floating_point() and query.is_floating_point()):
            raise PredictorError(
                f"context is {context.dtype} and query {query.dtype}, expected floating-point embeddings"
            )
        found = None if context_mask is None else (context_mask.dtype, tuple(context_mask.shape))
        if found not in (None, (torch.bool, tuple(context.shape[:2]))):
            raise PredictorError(f"context_mask is {found}, expected torch.bool {tuple(context.shape[:2])}")


class DecomposedJasperPredictor(JasperPredictor):
    """Prediction = coarse + fine, exactly: a mix of known centroids, and what leads from there."""

    config: SubspaceConfig
    centroids: Tensor

    def __init__(self, config: SubspaceConfig) -> None:
        super().__init__(config)
        self.config = config
        hidden, blocks, rate = config.hidden_dim, config.num_layers, config.dropout
        body = MLP(2 * config.input_dim, hidden, blocks, rate)
        self.router = nn.ModuleDict({"body": body, "choice": nn.Linear(hidden, config.num_subspaces)})
        self.coarse_encoder = MLP(config.input_dim, hidden, blocks, rate)
        self.register_buffer("centroids", torch.zeros(config.num_subspaces, config.output_dim))
        if config.residual == "query":
            self.coarse_gate = nn.Parameter(torch.zeros(()))

    def _read(self) -> int:
        return 3 if self.config.fine_input == "concat" else 1

    def _predict(self, question: Tensor, steering: Tensor) -> Prediction:
        seen = self.router["body"](torch.cat([question, steering], dim=-1))
        logits: Tensor = self.router["choice"](seen)
        routing = logits.softmax(dim=-1)
        if self.config.routing == "argmax":
            routing = functional.one_hot(routing.argmax(dim=-1), routing.shape[-1]).to(routing.dtype)
        coarse = routing @ self.centroids
        parts = [self.question_encoder(question), self.steering_encoder(steering)]
        parts.append(self.coarse_encoder(coarse))
        read = torch.cat(parts, dim=-1) if self.config.fine_input == "concat" else sum(parts)
        delta = self.output_proj(self.head(read))
        whole = coarse + delta
        if self.config.residual == "query":
            whole = question + self._capped(self.coarse_gate * coarse + self.residual_gate * delta)
        fine = functional.normalize(whole, dim=-1) - coarse
        return Prediction(coarse + fine, logits, routing, coarse, fine)


def _read_config(path: Path) -> JasperConfig:
    """The `model` section of a bundle's config.json; settings of the JAX service are left aside."""
    model = _read_json(path).get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"{path}: has no section 'model'")
    kinds = {"jasper": JasperConfig, "subspace": SubspaceConfig}
    if model.get("kind") not in kinds:
        raise CheckpointError(f"{path}: model.kind {model.get('kind')!r} is not jasper or subspace")
    kind = kinds[model["kind"]]
    names = [field.name for field in fields(kind)]
    for name in names:
        if name not in model:
            raise CheckpointError(f"{path}: model.{name} is missing")
    try:
        return kind(**{name: model[name] for name in names})
    except (TypeError, PredictorError) as unfit:
        raise CheckpointError(f"{path}: does not describe a model ({unfit})") from None


def load_bundle(folder: str | Path) -> JasperPredictor:
    """Open an exported bundle: verify every file, then build the model, in eval mode.

    Raises:
        CheckpointError: If a file is missing, damaged or does not fit; the message names it.
    """
    folder = Path(folder)
    verify(folder)
    weights = folder / "model.safetensors"
    return _with_weights(_read_config(folder / "config.json"), read_safetensors(weights), weights)


def _with_weights(config: JasperConfig, tensors: Mapping[str, Tensor], path: str | Path) -> JasperPredictor:
    """The model with these weights, in eval mode; a weight that does not fit is named."""
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        kind: Any = DecomposedJasperPredictor if isinstance(config, SubspaceConfig) else JasperPredictor
        model: JasperPredictor = kind(config)
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

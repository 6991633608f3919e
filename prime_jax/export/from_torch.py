"""The way back: weights trained in PyTorch become a JAX model again.

Takes what `torch_runtime` writes (`save_checkpoint`), what `torch.save(model.state_dict(), ...)` writes, a
safetensors file, a bundle, or a dictionary of tensors. Nothing in a file is executed (SEC-PRED-001).
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from prime_jax.errors import CheckpointError, PredictorError, first_fault
from prime_jax.export.optional import need
from prime_jax.files import read_json
from prime_jax.manifest import MANIFEST, verify_manifest
from prime_jax.models import KINDS, AnyConfig, Model, kind_of, model_config
from prime_jax.models.bundle import read_tensors
from prime_jax.models.state_dict import load_state_dict

Config = AnyConfig | Mapping[str, Any] | str | Path


def from_torch(source: str | Path | Mapping[str, Any], config: Config | None = None) -> Model:
    """Build the JAX model whose weights PyTorch trained.

    Args:
        source: A `.pt`, `.pth` or `.safetensors` file, a bundle folder, or tensors (torch's or numpy's) by
            the names of `state_dict`. Half precision becomes float32.
        config: Shape and behaviour: a config, its fields, or a bundle's config.json. Not needed for a
            bundle, nor for a file of `save_checkpoint`, which hold their own.

    Returns:
        The model, float32. `Predictor.from_model` serves it, `write_bundle` hands it over, and its bundle
        can be `model.checkpoint_path` of another training run.

    Raises:
        CheckpointError: If a file is missing, damaged or holds code; a tensor is missing, unexpected,
            misshapen, or holds NaN or Inf; the message names it.
        PredictorError: If the config is missing or not valid.
    """
    if isinstance(source, Mapping):
        where, tensors, stored = "state_dict", dict(source), None
    else:
        where = str(source)
        tensors, stored = _read(Path(source))
    chosen = _as_config(stored if config is None else config, where)
    if stored is not None and config is not None:
        _check_same(_as_config(stored, where), chosen, where)
    try:
        return load_state_dict(chosen, {name: _as_float32(tensor) for name, tensor in tensors.items()})
    except CheckpointError as unfit:
        raise CheckpointError(f"{where}: {unfit}") from None


def _read(path: Path) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """Tensors by name, and the config where the file has one."""
    if (path / MANIFEST).is_file():
        verify_manifest(path, "bundle")
        return read_tensors(path / "model.safetensors"), read_json(path / "config.json").get("model")
    if path.suffix == ".safetensors":
        return read_tensors(path), None
    if path.suffix not in (".pt", ".pth"):
        raise CheckpointError(f"{path}: expected a .pt, .pth or .safetensors file, or a bundle folder")
    need("torch", "torch")
    from prime_jax.export import torch_runtime

    import_module("prime_jax.export.torch_llama")  # makes such layers known
    try:
        saved = torch_runtime.read_pt(path)
        if "state_dict" not in saved:
            if not all(isinstance(one, str) and hasattr(saved[one], "detach") for one in saved):
                raise CheckpointError(f"{path}: holds other things than tensors by name")
            return saved, None
        model = torch_runtime.EmbeddingPredictor.load_checkpoint(path)
    except torch_runtime.PredictorError as refused:
        raise CheckpointError(str(refused)) from None
    return dict(model.state_dict()), saved["config"]


def _as_config(config: Config | None, where: str) -> AnyConfig:
    if config is None:
        raise PredictorError(f"{where}: holds no config; name the config.json of the bundle it came from")
    fields: Mapping[str, Any]
    if isinstance(config, Mapping):
        fields = config
    elif not isinstance(config, str | Path):
        return config
    else:
        where = str(config)
        read = read_json(Path(config))
        if not isinstance(read, dict) or not isinstance(read.get("model"), dict):
            raise PredictorError(f"{where}: has no section 'model'")
        fields = read["model"]
    if kind_of(dict(fields)) not in KINDS:
        raise PredictorError(f"{where}: model.kind {fields['kind']!r} is none of {', '.join(KINDS)}")
    try:
        return model_config(fields)
    except pydantic.ValidationError as invalid:
        raise PredictorError(f"{where}: {first_fault(invalid, within='model')}") from None


_COMPUTED_BY = (
    *("kind", "num_heads", "context_attention", "residual", "max_delta", "max_context_length"),
    *("routing", "fine_input", "block", "num_kv_heads", "head_dim", "norm_eps", "rope_theta", "rope_scaling"),
    *("average", "linear", "keep_query"),
    *(
        "encoder",
        "pooling",
        "separator_id",
        "separate_turns",
        "roles",
        "max_tokens",
        "lower_case",
        "query_weight",
    ),
)


def _check_same(own: AnyConfig, given: AnyConfig, where: str) -> None:
    """Refuse a config that would compute something else with the same weights."""
    for name in _COMPUTED_BY:
        before, now = getattr(own, name, None), getattr(given, name, None)
        if before != now:
            raise PredictorError(f"{where}: was saved with {name} {before!r}, the config given says {now!r}")


def _as_float32(tensor: Any) -> np.ndarray[Any, np.dtype[Any]]:
    """A numpy array; floating-point numbers of any precision become float32, others stay what they are."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        return np.asarray(tensor.numpy())
    array = np.asarray(tensor)
    return array.astype(np.float32) if array.dtype.kind == "f" else array

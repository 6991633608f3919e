"""Pretrained Llama layers from a local Hugging Face folder into a predictor (BR-PRED-005), without torch.

The folder holds `config.json` and `model.safetensors`, or shards with their index. Tensors are read one at a
time and only those of the layers that are asked for.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
from jaxtyping import Float32

from prime_jax import files
from prime_jax.errors import ConfigError, DataError
from prime_jax.frozen import Frozen
from prime_jax.models.prime import PredictorConfig
from prime_jax.nn.rotary import RopeScaling
from prime_jax.pretrained.weights import Weights

Place = tuple[str | int, ...]
"""Where a parameter lies among a model's: `("layers", 0, "q_proj", "kernel")`."""


class LlamaConfig(Frozen):
    """The fields of a Hugging Face `config.json` that decide what a Llama computes; others are ignored."""

    model_config = pydantic.ConfigDict(extra="ignore")

    model_type: Literal["llama"]
    hidden_size: int = pydantic.Field(gt=0)
    intermediate_size: int = pydantic.Field(gt=0)
    num_hidden_layers: int = pydantic.Field(gt=0)
    num_attention_heads: int = pydantic.Field(gt=0)
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = pydantic.Field(gt=0)
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None

    def settings(self) -> dict[str, Any]:
        """What a predictor must say to have such layers, by the names of its own settings."""
        return {
            "hidden_dim": self.hidden_size,
            "num_heads": self.num_attention_heads,
            "kv_heads": self.num_key_value_heads or self.num_attention_heads,
            "head_size": self.head_dim or self.hidden_size // self.num_attention_heads,
            "mlp_dim": self.intermediate_size,
            "norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling,
        }


_OPTIONS = {"kv_heads": "num_kv_heads", "head_size": "head_dim"}  # where a setting may be left to another


def read_llama_config(folder: Path) -> LlamaConfig:
    """Read and check `config.json`, of transformers 4 or 5.

    Raises:
        DataError: If it is missing or not a Llama that these layers compute; names file and field.
    """
    path = folder / "config.json"
    fields = files.read_json(path, DataError)
    if not isinstance(fields, dict):
        raise DataError(f"{path}: not a JSON object")
    fields = _older_names(fields)
    try:
        return LlamaConfig.model_validate(fields)
    except pydantic.ValidationError as wrong:
        problems = "; ".join(
            f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in wrong.errors()
        )
        raise DataError(f"{path}: not a Llama this library can run ({problems})") from None


def check_fits(config: PredictorConfig) -> None:
    """Whether the layers that `init_from` names are those the configuration describes.

    Raises:
        ConfigError: If a size differs, or the folder has fewer layers; names the setting and its value there.
        DataError: If config.json is missing or of another kind of model.
    """
    assert config.init_from is not None
    folder = Path(config.init_from.path)
    if not folder.is_dir():
        raise ConfigError(f"model.init_from.path {folder}: there is no such folder")
    there = read_llama_config(folder)
    for name, wanted in there.settings().items():
        given = getattr(config, name)
        if name == "mlp_dim":
            given = given or 4 * config.hidden_dim
        if given != wanted:
            option = _OPTIONS.get(name, name)
            shown = wanted.model_dump() if isinstance(wanted, RopeScaling) else wanted
            raise ConfigError(
                f"model.{option} is {given!r}, but the layers of {folder} were made with {wanted!r}; set "
                f"model.{option}: {shown}"
            )
    if config.init_from.layers[1] > there.num_hidden_layers:
        raise ConfigError(
            f"model.init_from.layers {list(config.init_from.layers)}: {folder} has the layers 0 to "
            f"{there.num_hidden_layers - 1}"
        )


def pretrained_layers(config: PredictorConfig) -> Iterator[tuple[Place, Float32[np.ndarray, "..."]]]:
    """The parameters of the layers that `init_from` names, one tensor at a time, where they go.

    The final norm comes along where the run ends at the folder's last layer: it belongs behind that one.

    Raises:
        ConfigError: As `check_fits`.
        DataError: If a tensor is missing, unexpected, truncated, or of another shape or dtype; names file and
            tensor.
    """
    check_fits(config)
    assert config.init_from is not None
    folder, (first, end) = Path(config.init_from.path), config.init_from.layers
    weights = Weights(folder, lambda stored: stored.removeprefix("model."))
    hidden, asking = config.hidden_dim, config.num_heads * config.head_size
    asked, inner = config.kv_heads * config.head_size, config.mlp_dim or 4 * config.hidden_dim
    matrices = {
        "self_attn.q_proj": (asking, hidden),
        "self_attn.k_proj": (asked, hidden),
        "self_attn.v_proj": (asked, hidden),
        "self_attn.o_proj": (hidden, asking),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    norms = {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"}
    known = {f"{name}.weight" for name in (*matrices, *norms)}
    for number in range(first, end):
        prefix = f"layers.{number}."
        for name in weights.names():
            own = name.removeprefix(prefix)
            if name.startswith(prefix) and own not in known and own != "self_attn.rotary_emb.inv_freq":
                raise DataError(f"{folder}: tensor {name!r} has no place in a Llama layer of this library")
        for name, ours in norms.items():
            place = ("layers", number - first, ours, "scale")
            yield place, weights.take(f"{prefix}{name}.weight", (hidden,))
        for name, shape in matrices.items():
            place = ("layers", number - first, name.split(".")[1], "kernel")
            yield place, weights.take(f"{prefix}{name}.weight", shape).T
    if end == read_llama_config(folder).num_hidden_layers:
        yield ("norm", "scale"), weights.take("norm.weight", (hidden,))


def _older_names(fields: dict[str, Any]) -> dict[str, Any]:
    """Transformers 5 keeps all of RoPE in `rope_parameters`, 4 in `rope_theta` and `rope_scaling`."""
    rope = fields.get("rope_parameters")
    if isinstance(rope, dict):
        rest = {name: value for name, value in rope.items() if name != "rope_theta"}
        fields = {**fields, "rope_theta": rope.get("rope_theta", 10000.0), "rope_scaling": rest}
    scaling = fields.get("rope_scaling")
    if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) == "default":
        fields = {**fields, "rope_scaling": None}
    return fields

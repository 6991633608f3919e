"""Settings of a predictor's Llama layers: which belong together, and where pretrained ones come from."""

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from prime_jax.frozen import Frozen
from prime_jax.nn.llama import LlamaShape

if TYPE_CHECKING:
    from prime_jax.models.prime import PredictorConfig

LLAMA_ONLY = ("num_kv_heads", "head_dim", "mlp_dim", "norm_eps", "rope_theta", "rope_scaling", "init_from")


class InitFrom(Frozen):
    """A run of layers of a local Hugging Face folder (BR-PRED-005)."""

    path: str = Field(description="folder with config.json and safetensors")
    layers: tuple[int, int] = Field(description="first layer, and the one after the last")

    @model_validator(mode="after")
    def _some_layers(self) -> "InitFrom":
        first, end = self.layers
        if not 0 <= first < end:
            raise ValueError(
                f"layers {list(self.layers)} is no run of layers: give [first, one after the last]"
            )
        return self


def check_block(config: "PredictorConfig") -> None:
    """Whether the settings of a predictor's layers fit together.

    Raises:
        ValueError: If they do not; the message names the setting.
    """
    if config.block == "gelu":
        for name in LLAMA_ONLY:
            if getattr(config, name) != type(config).model_fields[name].default:
                raise ValueError(f"{name} belongs to llama layers, but block is 'gelu'")
        return
    if config.num_heads % config.kv_heads:
        raise ValueError(f"num_kv_heads {config.kv_heads} does not divide num_heads {config.num_heads}")
    if config.head_size % 2:
        raise ValueError(f"head_dim {config.head_size} is odd; rotary positions turn dimensions in pairs")
    if config.init_from is not None:
        first, end = config.init_from.layers
        if end - first != config.num_layers:
            raise ValueError(
                f"init_from.layers [{first}, {end}] are {end - first} layers, but num_layers is "
                f"{config.num_layers}"
            )
        if config.checkpoint_path is not None:
            raise ValueError("init_from and checkpoint_path both say where weights come from; give one")


def llama_shape(config: "PredictorConfig") -> LlamaShape:
    """Sizes of every layer of a predictor with llama layers."""
    return LlamaShape(
        hidden_dim=config.hidden_dim,
        num_heads=config.num_heads,
        num_kv_heads=config.kv_heads,
        head_dim=config.head_size,
        mlp_dim=config.mlp_dim or 4 * config.hidden_dim,
        norm_eps=config.norm_eps,
    )

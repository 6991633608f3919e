"""What all models have in common: how they are served, and what they answer in training."""

from typing import Literal

from pydantic import Field

from prime_jax.frozen import Frozen


class ServedConfig(Frozen):
    """The part of every model's configuration that says how it starts and how it is compiled."""

    kind: str = Field(default="prime", description="which model: prime, jasper or subspace")
    checkpoint_path: str | None = Field(
        default=None, description="run folder or bundle whose weights training starts from"
    )
    use_static_cache: bool = Field(
        default=True, description="pad requests to a few fixed shapes when predicting"
    )
    use_torch_compile: bool = Field(
        default=True, description="compile ahead of time, when the predictor is loaded"
    )
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = Field(
        default="reduce-overhead", description="how hard XLA works on the compiled predictor"
    )
    max_batch_size: int = Field(
        default=32, ge=1, description="largest compiled batch; larger ones run in chunks"
    )

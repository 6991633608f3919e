"""What all models have in common: how they are served, and what they answer in training."""

from typing import Any, Literal

from pydantic import Field

from prime_jax.frozen import Frozen
from prime_jax.types import Batch


def embeddings_of(batch: Batch) -> tuple[Any, ...]:
    """What a model of embeddings reads of a batch: context, query and context mask."""
    return (batch.context, batch.query, batch.context_mask)


class ServedConfig(Frozen):
    """The part of every model's configuration that says how it starts and how it is compiled."""

    kind: str = Field(default="prime", description="prime, jasper, subspace, text or mix")
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

    @property
    def reads_text(self) -> bool:
        """Whether requests are texts, not embeddings."""
        return False

    @property
    def takes_one_text(self) -> bool:
        """Whether the newest turn given is the embedding of query and turns as one text."""
        return False

    @property
    def session(self) -> Literal["cache", "window", "none"]:
        """What a session keeps of turns: what was computed of them, them alone, or there is no session."""
        return "none"

    def inputs_of(self, batch: Batch) -> tuple[Any, ...]:
        """What the model reads of a batch, in the order of its `details`."""
        return embeddings_of(batch)

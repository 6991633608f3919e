"""What all models have in common: how they are served, and what they answer in training."""

from typing import Any, Literal

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Key
from pydantic import Field

from prime_jax.frozen import Frozen
from prime_jax.nn.remat import Remat
from prime_jax.types import Batch, Prediction


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


class CountedModel(nnx.Module):
    """What every model is: a module that knows its size."""

    def num_params(self) -> int:
        """Number of trained numbers."""
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self, nnx.Param)))


class TurnsModel(CountedModel):
    """A model of turns and a query that has one answer, in training and outside."""

    def details(
        self,
        context: Float[Array, "B N D"],
        query: Float[Array, "B D"],
        context_mask: Bool[Array, "B N"] | None = None,
        *,
        dropout_key: Key[Array, ""] | None = None,
        remat: Remat = "none",
        progress: Float[Array, ""] | float = 1.0,
    ) -> Prediction:
        """The prediction as every model gives it in training; `progress` changes nothing here."""
        model: Any = self
        return Prediction(model(context, query, context_mask, dropout_key=dropout_key, remat=remat))

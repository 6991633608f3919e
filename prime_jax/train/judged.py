"""The loss as weights are judged by: no dropout, nothing turned, schedules where the run ends.

What hybrid training compares candidates with, so it is the same function from the first step to the last.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from prime_jax.losses.corpus import Corpus
from prime_jax.losses.objective import Objective
from prime_jax.models.base import embeddings_of
from prime_jax.nn.remat import Remat
from prime_jax.train.adapters import without_gradient
from prime_jax.train.state import MODEL, Graph, trained_weights
from prime_jax.train.step import Inputs, apart, whole_weights
from prime_jax.turns import one_turn, rejoined
from prime_jax.types import Batch, Prediction


class Given(NamedTuple):
    """What is judged on.

    Attributes:
        batch: On the devices.
        corpus: All passages, where they are the negatives, or None.
    """

    batch: Batch
    corpus: Corpus | None


@lru_cache(maxsize=8)  # so that runs of one process with the same settings share what is compiled of it
def make_judged_loss(
    graph: Graph,
    objective: Objective,
    mesh: Mesh | None = None,
    *,
    remat: Remat = "none",
    micro_batch: int = 0,
    layers_frozen: bool = False,
    inputs_of: Callable[[Batch], Inputs] = embeddings_of,
) -> Callable[[Any, Given], Float[Array, ""]]:
    """Build `loss(weights, given)`, to be jitted and differentiated by whoever uses it.

    Args:
        graph: Structure of the model.
        objective: What is minimised; one without a moving average.
        mesh: The devices; None for the one that JAX prefers.
        remat: What the backward pass recomputes.
        micro_batch: Rows whose activations are held at a time, those of a smaller batch too; 0: all.
        layers_frozen: Whether the transformer layers get no gradient.
        inputs_of: What the model reads of a batch.
    """

    def loss(params: Any, given: Given) -> Float[Array, ""]:
        batch, corpus = given
        weights, own = apart(whole_weights(params, mesh))
        if layers_frozen:
            weights = {**weights, MODEL: without_gradient(weights[MODEL])}
        inputs = inputs_of(batch)
        turns = max(1, batch.query.shape[0] // micro_batch) if micro_batch else 1

        def predict(inputs: Any) -> Prediction:
            model = nnx.merge(graph, trained_weights(weights))
            prediction: Prediction = model.details(*inputs, remat=remat)
            return prediction

        if turns == 1:
            predicted = predict(inputs)
        else:  # the backward pass predicts each turn again
            turn = jax.checkpoint(lambda number: predict(one_turn(inputs, number, turns)))
            predicted = rejoined(jax.lax.map(turn, jnp.arange(turns)))
        value, _ = objective(predicted, batch, own, progress=1.0, corpus=corpus, turns=turns)
        return value

    return loss

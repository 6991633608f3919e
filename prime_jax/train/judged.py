"""The loss as weights are judged by: no dropout, nothing turned, schedules where the run ends.

What hybrid training compares candidates with, so it is the same function from the first step to the last.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from prime_jax.losses import AnyObjective
from prime_jax.losses.corpus import Corpus
from prime_jax.train.adapters import without_gradient
from prime_jax.train.state import MODEL, Graph, trained_weights
from prime_jax.train.step import StepPlan, apart, whole_weights
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


def make_judged_loss(
    graph: Graph, objective: AnyObjective, plan: StepPlan, mesh: Mesh | None = None
) -> Callable[[Any, Given], Float[Array, ""]]:
    """Build `loss(weights, given)`, to be jitted and differentiated by whoever uses it.

    Args:
        graph: Structure of the model.
        objective: What is minimised; one without a moving average.
        plan: How the step goes; a micro-batch bounds the activations here too.
        mesh: The devices; None for the one that JAX prefers.
    """

    def loss(params: Any, given: Given) -> Float[Array, ""]:
        batch, corpus = given
        weights, own = apart(whole_weights(params, mesh))
        if plan.layers_frozen:
            weights = {**weights, MODEL: without_gradient(weights[MODEL])}
        inputs = (batch.context, batch.query, batch.context_mask)
        turns = batch.query.shape[0] // plan.micro_batch if plan.micro_batch else 1

        def predict(inputs: Any) -> Prediction:
            model = nnx.merge(graph, trained_weights(weights))
            prediction: Prediction = model.details(*inputs, remat=plan.remat)
            return prediction

        if turns == 1:
            predicted = predict(inputs)
        else:  # the backward pass predicts each turn again
            turn = jax.checkpoint(lambda number: predict(one_turn(inputs, number, turns)))
            predicted = rejoined(jax.lax.map(turn, jnp.arange(turns)))
        value, metrics = objective(
            predicted,
            batch,
            own,
            progress=1.0,
            epoch=float(plan.total_steps) / plan.epoch_steps,
            corpus=corpus,
            turns=turns,
        )
        return metrics.get("total", value)

    return loss

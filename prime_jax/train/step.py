"""One training step: pure, jitted once, the same on one device or many."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import optax
from flax import nnx
from jaxtyping import Array

from prime_jax.losses.corpus import Corpus
from prime_jax.losses.objective import contrastive_objective
from prime_jax.train.state import Graph, TrainState
from prime_jax.types import Batch

Metrics = dict[str, Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    graph: Graph,
    optimizer: optax.GradientTransformation,
    *,
    temperature: float,
    remat: bool,
    corpus: Corpus | None = None,
) -> Step:
    """Build the jitted step; the state it is given is donated.

    Args:
        graph: Structure of the model.
        optimizer: Turns gradients into updates.
        temperature: Of InfoNCE.
        remat: Recompute activations in the backward pass (FR-PRED-010).
        corpus: The negatives of every row; None means the other targets of the batch.
    """

    def loss_fn(params: Any, batch: Batch, corpus: Corpus | None, key: Array) -> tuple[Array, Metrics]:
        model = nnx.merge(graph, params)
        predicted = model(batch.context, batch.query, batch.context_mask, dropout_key=key, remat=remat)
        return contrastive_objective(predicted, batch, temperature, corpus)

    def step(state: TrainState, batch: Batch, corpus: Corpus | None) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        (_, metrics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch, corpus, key)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["gradient_norm"] = optax.tree.norm(gradient)
        return replace(state, step=state.step + 1, params=params, opt_state=opt_state), metrics

    jitted = jax.jit(step, donate_argnums=0)
    return lambda state, batch: jitted(state, batch, corpus)

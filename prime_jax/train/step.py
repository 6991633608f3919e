"""One training step: pure, jitted once, the same on one device or many.

With a micro-batch, activations are held for that many rows at a time and the loss still sees the whole batch
(gradient caching, arXiv 2101.06983): a first pass predicts everything, the loss gives each prediction its
gradient, a second pass predicts again, with the same dropout, and carries these gradients to the weights.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array

from prime_jax.losses import AnyObjective
from prime_jax.losses.corpus import Corpus
from prime_jax.models.base import embeddings_of
from prime_jax.nn.remat import Remat
from prime_jax.nn.target_head import ema, ema_decay
from prime_jax.train.adapters import without_gradient
from prime_jax.train.encoders import ENCODERS, EncoderPlan
from prime_jax.train.rotation import random_rotation
from prime_jax.train.sharding import replicated, state_shardings
from prime_jax.train.state import ADAPTERS, MODEL, Graph, TrainState, averaged_weights, trained_weights
from prime_jax.turns import one_turn, rejoined
from prime_jax.types import Batch, Prediction

Metrics = dict[str, Array]
Inputs = tuple[Any, ...]  # what a model reads, such as context, query and context_mask
_ROTATION = 2**31 - 1  # tells its random numbers from those of dropout


@dataclass(frozen=True)
class StepPlan:
    """What a step needs to know besides the state and the batch.

    Attributes:
        total_steps: Length of the run, for what moves with its progress.
        remat: What the backward pass recomputes instead of keeping it (FR-PRED-010).
        micro_batch: Rows whose activations are held at a time; 0 for the whole batch.
        ema: First and last decay of the averaged target head.
        rotation: Share of batches that are turned (see `prime_jax.train.rotation`); needs D = E.
        average_weights: Decay of the moving average of the weights, where the state has one.
        epoch_steps: Length of an epoch, for what moves with epochs.
        layers_frozen: Whether the transformer layers get no gradient.
        encoders: How texts are embedded, where encoders are trained.
        inputs_of: What the model reads of a batch.
        compute_dtype: Dtype of the models' products, in which shared matrices are gathered.
    """

    total_steps: int = 1
    remat: Remat = "none"
    micro_batch: int = 0
    ema: tuple[float, float] = (0.996, 0.999)
    rotation: float = 0.0
    average_weights: float = 0.0
    epoch_steps: int = 1
    layers_frozen: bool = False
    encoders: EncoderPlan | None = None
    inputs_of: Callable[[Batch], Inputs] = embeddings_of
    compute_dtype: DTypeLike = jnp.float32


def make_train_step(
    graph: Graph,
    optimizer: optax.GradientTransformation,
    objective: AnyObjective,
    plan: StepPlan,
    mesh: Mesh | None = None,
) -> Any:
    """Build the jitted step `step(state, batch, corpus=None) -> (state, metrics)`; it donates the state.

    Args:
        graph: Structure of the model.
        optimizer: Turns gradients into updates.
        objective: What is minimised.
        plan: How.
        mesh: The devices; None for the one that JAX prefers.

    Returns:
        A jitted function, so that `.lower(...).compile()` works too. Its metrics are scalars: those of the
        objective, `gradient_norm`, and `finite`, which is False where the step changed nothing because the
        loss or the gradient was no finite number, or because a step before it had that fault.
    """

    def predict(params: Any, inputs: Inputs, key: Array, turned: Array | None, done: Array) -> Prediction:
        params = whole_weights(params, mesh, plan.compute_dtype)
        if plan.layers_frozen:
            params = {**params, MODEL: without_gradient(params[MODEL])}
        if plan.encoders is not None:
            inputs = plan.encoders.read(params, inputs)
        answer = partial(
            nnx.merge(graph, trained_weights(params)).details,
            dropout_key=key,
            remat=plan.remat,
            progress=done,
        )
        if turned is None:
            whole: Prediction = answer(*inputs)
            return whole
        context, query, mask = inputs
        with jax.named_scope("rotation"):
            context, query = context @ turned, query @ turned
        prediction: Prediction = answer(context, query, mask)
        with jax.named_scope("rotation"):  # targets stay as they are
            return prediction._replace(embedding=prediction.embedding @ turned.T)

    def loss_and_gradient(state: TrainState, batch: Batch, corpus: Corpus | None) -> tuple[Metrics, Any]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        inputs = (plan.inputs_of if plan.encoders is None else plan.encoders.inputs_of)(batch)
        done = state.step / plan.total_steps
        models, own = apart(state.params)
        turned = None
        if plan.rotation:
            turned = random_rotation(jax.random.fold_in(key, _ROTATION), batch.query.shape[1], plan.rotation)
        turns = batch.query.shape[0] // plan.micro_batch if plan.micro_batch else 1

        def loss(prediction: Prediction, own: Any, batch: Batch = batch) -> tuple[Array, Metrics]:
            return objective(
                prediction,
                batch,
                own,
                average=state.average,
                progress=done,
                epoch=state.step / plan.epoch_steps,
                corpus=corpus,
                turns=turns,
            )

        if turns == 1:

            def whole(params: Any) -> tuple[Array, Metrics]:
                models, own = apart(params)
                seen = batch
                if plan.encoders is not None:
                    weights = whole_weights(models, mesh, plan.compute_dtype)
                    seen = plan.encoders.with_targets(weights, batch)
                return loss(predict(models, inputs, key, turned, done), own, seen)

            (_, metrics), gradient = jax.value_and_grad(whole, has_aux=True)(state.params)
            return metrics, gradient

        def predict_turn(params: Any, turn: Array) -> Prediction:
            return predict(params, one_turn(inputs, turn, turns), jax.random.fold_in(key, turn), turned, done)

        predicted = jax.lax.map(lambda turn: predict_turn(models, turn), jnp.arange(turns))
        (_, metrics), (slope, own_gradient) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
            rejoined(predicted), own
        )

        def add(total: Any, turn: Array) -> tuple[Any, None]:
            _, pull_back = jax.vjp(lambda params: predict_turn(params, turn), models)
            return jax.tree.map(jnp.add, total, pull_back(one_turn(slope, turn, turns))[0]), None

        nothing = jax.tree.map(jnp.zeros_like, models)
        gradient, _ = jax.lax.scan(add, nothing, jnp.arange(turns))
        return metrics, {**gradient, **own_gradient}

    def step(state: TrainState, batch: Batch, corpus: Corpus | None = None) -> tuple[TrainState, Metrics]:
        metrics, gradient = loss_and_gradient(state, batch, corpus)
        norm = optax.tree.norm(gradient)
        whole = metrics.get("total", metrics["loss"])
        finite = jnp.isfinite(whole) & jnp.isfinite(norm) & ~state.halted
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        if plan.encoders is not None:
            updates = plan.encoders.gated(updates, state.step / plan.epoch_steps)
        params = optax.apply_updates(state.params, updates)
        if plan.encoders is not None:
            params = plan.encoders.averaged(params, (state.step + 1) / plan.total_steps)
        average = state.average
        if objective.averaged is not None:
            decay = ema_decay(*plan.ema, (state.step + 1) / plan.total_steps)
            latest = params[objective.averaged]
            average = jax.tree.map(lambda old, new: ema(old, new, decay), average, latest)
            metrics["ema_decay"] = decay
        moved = replace(
            state,
            step=state.step + 1,
            params=params,
            average=average,
            smoothed=_smoothed(state, params, plan.average_weights),
            opt_state=opt_state,
        )
        kept: TrainState = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state)
        return replace(kept, halted=~finite), {**metrics, "gradient_norm": norm, "finite": finite}

    if mesh is None:
        return jax.jit(step, donate_argnums=0)

    def constrained(
        state: TrainState, batch: Batch, corpus: Corpus | None = None
    ) -> tuple[TrainState, Metrics]:
        state, metrics = step(state, batch, corpus)
        state = jax.lax.with_sharding_constraint(state, state_shardings(mesh, state))
        return state, jax.lax.with_sharding_constraint(metrics, replicated(mesh))

    return jax.jit(constrained, donate_argnums=0)


def whole_weights(params: Any, mesh: Mesh | None, dtype: DTypeLike = jnp.float32) -> Any:
    """Weights come together where they are used; gradients go back to their shares in float32.

    Matrices that are used in `dtype` travel in it, which halves the traffic of bfloat16 and changes no bit of
    what is computed. With adapters they travel in float32, since the sum of both is what is rounded.
    """
    if mesh is None:
        return params
    place = replicated(mesh)
    if mesh.shape["fsdp"] == 1 or jnp.dtype(dtype) == jnp.float32 or ADAPTERS in params:
        return jax.lax.with_sharding_constraint(params, place)

    @jax.custom_vjp
    def gather_rounded(matrix: Array) -> Array:
        # Rounded where the share lies, then gathered as integers, which XLA promotes on no backend.
        bits = jax.lax.bitcast_convert_type(matrix.astype(dtype), jnp.uint16)
        bits = jax.lax.with_sharding_constraint(bits, state_shardings(mesh, bits))
        bits = jax.lax.with_sharding_constraint(bits, place)
        return jax.lax.bitcast_convert_type(bits, dtype).astype(matrix.dtype)

    def forward(matrix: Array) -> tuple[Array, None]:
        return gather_rounded(matrix), None

    def backward(_: None, gradient: Array) -> tuple[Array]:
        return (jax.lax.with_sharding_constraint(gradient, place),)

    gather_rounded.defvjp(forward, backward)

    def gather(path: Any, leaf: Array) -> Array:
        used_in_products = getattr(path[-1], "key", None) == "kernel" and leaf.ndim == 2
        return gather_rounded(leaf) if used_in_products else jax.lax.with_sharding_constraint(leaf, place)

    return jax.tree_util.tree_map_with_path(gather, params)


def apart(params: Any) -> tuple[Any, Any]:
    """What a prediction depends on, and what the objective trains beside it."""
    models = {name: value for name, value in params.items() if name in (MODEL, ADAPTERS, *ENCODERS)}
    return models, {name: value for name, value in params.items() if name not in models}


def _smoothed(state: TrainState, params: Any, decay: float) -> Any:
    """The average of the weights after this step; it forgets faster at first, when weights are far off."""
    if state.smoothed is None:
        return None
    steps = state.step.astype(jnp.float32)
    now = jnp.minimum(decay, (1 + steps) / (10 + steps))
    return jax.tree.map(
        lambda average, weight: ema(average, weight, now), state.smoothed, averaged_weights(params)
    )

"""The step is pure; gradient caching, objectives and precision change what they should and nothing else."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import steps
from steps import MODEL, ROWS, assert_same, batch, run, shared, with_everything

from prime_jax.config import MeshConfig, TrainingConfig
from prime_jax.errors import ConfigError
from prime_jax.losses.objective import Objective
from prime_jax.train.optim import make_optimizer
from prime_jax.train.sharding import make_mesh
from prime_jax.train.state import build_graph, init_state
from prime_jax.train.step import StepPlan, make_train_step
from prime_jax.types import Prediction

EVERYTHING = Objective(schedule="learned", projection_dim=4, target="ema")


def test_same_state_same_batch_same_result_and_other_dropout_next_step() -> None:
    first, again = run(dropout=0.5), run(dropout=0.5)
    assert first[1] == again[1]
    assert_same(first, again, 0.0)
    assert shared(dropout=0.0)[1] != first[1]


@pytest.mark.parametrize("objective", [Objective(), EVERYTHING, replace(EVERYTHING, target="slow")])
@pytest.mark.parametrize("micro_batch", [4, 8])
def test_gradient_caching_equals_the_whole_batch(objective: Objective, micro_batch: int) -> None:
    """The loss sees every row whatever the micro-batch, given negatives and several right answers too."""
    whole = shared(objective=objective, make=with_everything)
    assert_same(run(objective=objective, make=with_everything, plan=StepPlan(10, "none", micro_batch)), whole)


def test_gradient_caching_with_corpus_negatives_and_remat() -> None:
    assert_same(run(corpus=True, plan=StepPlan(10, "blocks", 4)), shared(corpus=True))


def test_gradient_caching_repeats_its_dropout() -> None:
    """The gradient is that of the very predictions the loss saw: autodiff over the same micro-batches."""
    config = MODEL.model_copy(update={"dropout": 0.4})
    graph = build_graph(config, jnp.float32)
    state = init_state(config, optax.sgd(1.0), 0)
    rows = jax.tree.map(jnp.asarray, batch(3))
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

    def plain(params: object) -> jax.Array:
        from flax import nnx

        model = nnx.merge(graph, params)
        predicted = jnp.zeros((ROWS, steps.DIM))
        for turn in range(4):
            mine = jnp.arange(turn, ROWS, 4)
            answer = model(
                rows.context[mine],
                rows.query[mine],
                rows.context_mask[mine],
                dropout_key=jax.random.fold_in(key, turn),
            )
            predicted = predicted.at[mine].set(answer)
        return Objective()(Prediction(predicted), rows, {})[0]

    gradient = jax.grad(plain)(state.params["model"])
    before = jax.tree.map(np.asarray, state.params["model"])
    step = make_train_step(graph, optax.sgd(1.0), Objective(), StepPlan(10, micro_batch=4))
    after, _ = step(state, rows)
    for old, new, slope in zip(*map(jax.tree.leaves, (before, after.params["model"], gradient)), strict=True):
        np.testing.assert_allclose(old - np.asarray(new), slope, atol=1e-5 * np.abs(slope).max())


def test_memory_of_a_cached_step_does_not_grow_with_the_batch() -> None:
    """XLA's own account: 8 times the rows, the same temporaries but for predictions and their gradients."""

    def temporaries(rows: int) -> int:
        config = MODEL.model_copy(update={"hidden_dim": 256})
        state = jax.eval_shape(lambda: init_state(config, optax.sgd(0.1), 0))
        step = make_train_step(
            build_graph(config, jnp.float32), optax.sgd(0.1), Objective(), StepPlan(10, "none", 64)
        )
        return step.lower(state, batch(0, rows)).compile().memory_analysis().temp_size_in_bytes

    small, large = temporaries(256), temporaries(2048)
    similarities = 64 * 2048 * 4  # of one micro-batch to the whole batch, which is what has to grow
    assert large - small < 8 * similarities
    assert temporaries(2048) < 2 * small


@pytest.mark.parametrize("policy", ["blocks", "dots"])
def test_remat_changes_nothing(policy: str) -> None:
    assert_same(run(dropout=0.3, plan=StepPlan(10, policy)), shared(dropout=0.3))


def test_repeating_one_batch_learns_it() -> None:
    """From about chance (log 8) to nearly nothing."""
    config = TrainingConfig(learning_rate=1e-3, warmup_steps=0, weight_decay=0.0)
    state, told = run(60, optimizer=make_optimizer(config, 1000), make=lambda _: batch(0))
    assert told[0]["loss"] > 1.5
    assert told[-1]["loss"] < 0.05
    assert told[-1]["chance"] == pytest.approx(np.log(ROWS - 1), rel=1e-5)  # every row has two right answers
    assert int(state.step) == 60


def test_a_bad_batch_changes_nothing_and_halts() -> None:
    """The step before stays the last one, with optimizer and average, until somebody looks."""
    poisoned = batch(1)._replace(query=np.full((ROWS, steps.DIM), np.nan, np.float32))
    batches = [batch(0), poisoned, batch(2)]
    adam = optax.adam(0.1)
    good = run(1, optimizer=adam, objective=EVERYTHING)
    bad = run(3, optimizer=adam, objective=EVERYTHING, make=lambda number: batches[number])
    assert [metrics["finite"] for metrics in bad[1]] == [1.0, 0.0, 0.0]
    assert bool(bad[0].halted)
    assert_same((replace(bad[0], halted=good[0].halted), []), (good[0], []), 0.0)


def test_a_learned_temperature_moves_within_its_bounds() -> None:
    """However large the step, it stays a temperature; a head and a projection are trained as well."""
    state, told = run(5, objective=EVERYTHING, optimizer=optax.sgd(1e6))
    assert all(0.01 <= metrics["temperature"] <= 0.5 for metrics in told)
    assert told[0]["temperature"] == pytest.approx(0.07)
    assert told[1]["temperature"] != told[0]["temperature"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params["temperature"]))
    moved, _ = run(2, objective=EVERYTHING)
    start = init_state(MODEL, optax.sgd(0.1), 0, EVERYTHING)
    for name in ("projection", "target_head"):
        assert not np.allclose(np.asarray(moved.params[name]), np.asarray(start.params[name]))


def test_an_annealed_temperature_goes_from_the_first_to_the_last() -> None:
    objective = Objective(temperature=0.1, schedule="annealed", temperature_end=0.02)
    _, told = run(5, objective=objective, plan=StepPlan(total_steps=4))
    temperatures = [metrics["temperature"] for metrics in told]
    assert temperatures == pytest.approx([0.1, 0.0883, 0.06, 0.0317, 0.02], abs=1e-4)


def test_the_average_follows_its_head_at_the_scheduled_decay() -> None:
    """By hand: average = d * average + (1 - d) * head, d from 0.5 to 0.9 on half a cosine."""
    objective, plan = Objective(target="ema"), StepPlan(total_steps=4, ema=(0.5, 0.9))
    average = np.zeros((steps.DIM, steps.DIM))
    for step in range(1, 4):
        state, _ = run(step, objective=objective, plan=plan)
        decay = 0.9 - 0.4 * 0.5 * (1 + np.cos(np.pi * step / 4))
        average = decay * average + (1 - decay) * np.asarray(state.params["target_head"])
        np.testing.assert_allclose(np.asarray(state.average), average, atol=1e-7)
    assert np.abs(average).max() > 1e-5


def test_a_slow_head_moves_at_its_share_of_the_learning_rate() -> None:
    """AdamW's first step has the size of the learning rate, for every weight with a gradient."""
    config = TrainingConfig(
        learning_rate=1e-2,
        warmup_steps=0,
        weight_decay=0.0,
        y_encoder_lr_multiplier=0.05,
        gradient_clip_val=0,
    )
    state, _ = run(1, objective=Objective(target="slow"), optimizer=make_optimizer(config, 1000))
    moved = np.abs(np.asarray(state.params["target_head"]))
    np.testing.assert_allclose(moved, 0.05 * 1e-2, rtol=0.02)


@pytest.mark.parametrize(
    ("mesh", "rows"),
    [
        (MeshConfig(data=3), 16),
        (MeshConfig(data=99), 16),
        (MeshConfig(data=0), 16),
        (MeshConfig(data=2), 7),
        (MeshConfig(fsdp=16), 16),
        (MeshConfig(fsdp=3), 16),
    ],
)
def test_a_mesh_that_does_not_fit_is_explained(mesh: MeshConfig, rows: int) -> None:
    with pytest.raises(ConfigError, match="devices"):
        make_mesh(mesh, rows)


def test_a_micro_batch_that_does_not_fit_is_explained() -> None:
    with pytest.raises(ConfigError, match="micro_batch_size 3 does not divide evenly among 2 devices"):
        make_mesh(MeshConfig(data=2), 12, 3)

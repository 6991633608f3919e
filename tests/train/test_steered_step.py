"""Real training steps of JASPER's models: what moves, at which pace, and what must never move."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jasper_parts import CENTROIDS, CLUSTERS, SMALL, batch
from steps import assert_same

from prime_jax.config import MeshConfig, TrainingConfig
from prime_jax.losses.jasper import ONLINE_ENCODER, JasperLossConfig, JasperObjective
from prime_jax.losses.objective import Objective
from prime_jax.models.jasper import JasperConfig
from prime_jax.models.subspace import CENTROIDS as NAME
from prime_jax.models.subspace import SubspaceConfig
from prime_jax.train.optim import make_optimizer
from prime_jax.train.sharding import make_mesh, split_batch, state_shardings
from prime_jax.train.state import MODEL, TrainState, build_graph, init_state
from prime_jax.train.step import StepPlan, make_train_step

PLAIN = JasperConfig(**(SMALL | {"num_layers": 1}), dropout=0.0)
ROUTED = SubspaceConfig(**(SMALL | {"num_layers": 1}), num_subspaces=CLUSTERS, dropout=0.2)
ROWS = 8


def objective(**settings: Any) -> JasperObjective:
    return JasperObjective(Objective(), JasperLossConfig(**settings), CENTROIDS, gumbel=(1.0, 0.1))


def run(
    steps: int,
    config: JasperConfig | SubspaceConfig = ROUTED,
    *,
    plan: StepPlan | None = None,
    optimizer: optax.GradientTransformation | None = None,
    averaging: bool = False,
    mesh: MeshConfig | None = None,
    ours: JasperObjective | None = None,
    make: Any = lambda number: batch(number, ROWS, hard=2),
) -> tuple[list[TrainState], list[dict[str, float]]]:
    """The states before the first and after every step, and the figures of the steps."""
    ours, optimizer, plan = ours or objective(), optimizer or optax.sgd(1e-3), plan or StepPlan(10)
    devices = make_mesh(mesh or MeshConfig(data=1), ROWS, plan.micro_batch)
    state = init_state(config, optimizer, 0, ours, averaging=averaging)
    if isinstance(config, SubspaceConfig):
        known = {NAME: jnp.copy(CENTROIDS)}
        smoothed = {**state.smoothed, NAME: jnp.copy(CENTROIDS)} if averaging else None
        params = {**state.params, MODEL: {**state.params[MODEL], **known}}
        state = replace(state, params=params, smoothed=smoothed)
    state = jax.device_put(state, state_shardings(devices, state))
    step = make_train_step(build_graph(config, jnp.float32), optimizer, ours, plan, devices)
    states, told = [jax.tree.map(np.array, state)], []
    for number in range(steps):
        state, figures = step(state, split_batch(make(number), devices))
        states.append(jax.tree.map(np.array, state))
        told.append({name: float(value) for name, value in figures.items()})
    return states, told


@pytest.mark.parametrize("accumulated", [1, 2])
def test_centroids_stay_bit_for_bit(accumulated: int) -> None:
    """Through AdamW with a strong weight decay, accumulation, and the average of the weights."""
    settings = TrainingConfig(
        learning_rate=1e-2, warmup_steps=0, weight_decay=0.5, accumulate_grad_batches=accumulated
    )
    (start, *_, state), told = run(
        6,
        optimizer=make_optimizer(settings, 100),
        plan=StepPlan(10, average_weights=0.9),
        averaging=True,
    )
    assert all(figures["finite"] for figures in told)
    for weights in (state.params[MODEL], state.smoothed, state.predicting):
        np.testing.assert_array_equal(weights[NAME], CENTROIDS)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), start.params[MODEL], state.params[MODEL])
    assert all(far > 1e-4 for name, part in moved.items() if name != NAME for far in jax.tree.leaves(part))


def test_the_average_follows_the_online_encoder_at_the_scheduled_decay() -> None:
    """By hand: d from 0.5 to 0.9 on half a cosine. In the public original the target never moves."""
    states, told = run(3, PLAIN, plan=StepPlan(total_steps=4, ema=(0.5, 0.9)))
    average = states[0].average
    jax.tree.map(np.testing.assert_array_equal, average, states[0].params[ONLINE_ENCODER])
    for number, (state, figures) in enumerate(zip(states[1:], told, strict=True), start=1):
        decay = 0.9 - 0.4 * 0.5 * (1 + np.cos(np.pi * number / 4))
        assert figures["ema_decay"] == pytest.approx(decay, rel=1e-5)
        average = {
            name: decay * average[name] + (1 - decay) * state.params[ONLINE_ENCODER][name] for name in average
        }
        for name, leaf in average.items():
            np.testing.assert_allclose(state.average[name], leaf, atol=1e-6, err_msg=name)
    assert np.abs(average["outer"]).max() > 1e-4


def test_without_an_average_there_is_none() -> None:
    states, told = run(1, PLAIN, ours=objective(ema=False))
    assert states[-1].average is None
    assert "ema_decay" not in told[0]


def test_schedules_follow_steps_and_epochs() -> None:
    """Five steps of a run of four, epochs of two: noise from 1 to 0.1, entropy's target over one epoch."""
    _, told = run(5, plan=StepPlan(4, epoch_steps=2), ours=objective(entropy_epochs=1.0))
    temperatures = [figures["gumbel_temperature"] for figures in told]
    assert temperatures == pytest.approx([1.0, 0.868198, 0.55, 0.231802, 0.1], rel=1e-4)
    start = np.log(CLUSTERS)
    targets = [figures["entropy_target"] for figures in told]
    assert targets == pytest.approx([start, (start + 0.1) / 2, 0.1, 0.1, 0.1], rel=1e-5)


def test_the_noise_of_the_routing_anneals_in_the_step_itself() -> None:
    """Two ends of the temperature: the same step at first, and another one halfway."""
    ends = (1.0, 0.1)
    routed = [
        run(
            2,
            ROUTED.model_copy(update={"gumbel_end": end}),
            plan=StepPlan(2),
            optimizer=optax.sgd(0.0),
        )[1]
        for end in ends
    ]
    first, halfway = ([told[step]["disentanglement"] for told in routed] for step in (0, 1))
    assert first[0] == first[1]
    assert halfway[0] != pytest.approx(halfway[1], rel=0.01)


def test_a_stage_sets_in_at_its_epoch() -> None:
    """VICReg from epoch 1 on; until then the run is that of a run without it."""
    plan, staged = StepPlan(10, epoch_steps=2), objective(stage_in={"vicreg": (1.0, 2.0)})
    left, right = (run(4, PLAIN, plan=plan, ours=ours)[0] for ours in (staged, objective(vicreg=0.0)))
    kernels = [[state.params[MODEL]["output_proj"]["kernel"] for state in states] for states in (left, right)]
    same = [bool((a == b).all()) for a, b in zip(*kernels, strict=True)]
    assert same == [True, True, True, True, False]  # step 2, at epoch 1, still has a weight of nothing


@pytest.mark.parametrize("micro_batch", [2, 4])
def test_gradient_caching_equals_the_whole_batch(micro_batch: int) -> None:
    """The losses see every row; without a router there is no noise that differs."""
    _same(run(2, PLAIN, plan=StepPlan(10, micro_batch=micro_batch)), run(2, PLAIN))


def _same(one: tuple[Any, Any], other: tuple[Any, Any]) -> None:
    assert_same((one[0][-1], one[1]), (other[0][-1], other[1]))


def test_gradient_caching_reaches_the_router() -> None:
    """Every output of the model carries its gradient back, not the embedding alone."""
    only = objective(contrastive=1e-9, jepa=0.0, centroid=0.0, vicreg=0.0)
    (start, end), _ = run(1, plan=StepPlan(10, micro_batch=4), ours=only)
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), start.params[MODEL]["router"], end.params[MODEL]["router"]
    )
    assert min(jax.tree.leaves(moved)) > 1e-6


def test_many_devices_equal_one() -> None:
    """The noise of the routing too."""
    wide = ROUTED.model_copy(update={"hidden_dim": 128})  # wide enough for its matrices to be shared out
    _same(run(2, wide, mesh=MeshConfig(data=2, fsdp=2)), run(2, wide))


def test_repeating_one_batch_learns_it() -> None:
    """InfoNCE from about chance to nearly nothing, and the router knows every row's cluster."""
    settings = TrainingConfig(learning_rate=5e-3, warmup_steps=0, weight_decay=0.0)
    rows = batch(0, ROWS)
    _, told = run(
        150,
        ROUTED.model_copy(update={"dropout": 0.0}),
        plan=StepPlan(150, epoch_steps=150),
        optimizer=make_optimizer(settings, 300),
        ours=objective(contrastive=2.0, vicreg=0.01, entropy_epochs=1.0),
        make=lambda _: rows,
    )
    assert told[0]["loss"] > 1.5
    assert told[-1]["loss"] < 0.1
    assert told[-1]["chance"] == pytest.approx(np.log(ROWS))
    assert told[-1]["routing_accuracy"] == 1.0

"""The moving average of the weights: by hand, in parts on devices, kept, and what predicts."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from steps import MODEL, ROWS, batch

from prime_jax.config import Config, MeshConfig, TrainingConfig
from prime_jax.losses.objective import Objective
from prime_jax.train import checkpoints
from prime_jax.train.sharding import make_mesh, split_batch, state_shardings
from prime_jax.train.state import TrainState, build_graph, init_state, pure_params
from prime_jax.train.step import StepPlan, make_train_step

DECAY = 0.2


def fresh(averaging: bool = True) -> TrainState:
    return init_state(MODEL, optax.sgd(0.1), 0, averaging=averaging)


def states(mesh: MeshConfig, averaging: bool = True) -> list[TrainState]:
    """The state before and after each of three steps."""
    devices = make_mesh(mesh, ROWS)
    shardings = state_shardings(devices, jax.eval_shape(lambda: fresh(averaging)))
    state = jax.device_put(fresh(averaging), shardings)
    plan = StepPlan(10, average_weights=DECAY)
    step = make_train_step(build_graph(MODEL, jnp.float32), optax.sgd(0.1), Objective(), plan, devices)
    seen = [jax.device_get(state)]
    for number in range(3):
        state, _ = step(state, split_batch(batch(number), devices))
        seen.append(jax.device_get(state))
    return seen


def test_by_hand_and_on_many_devices() -> None:
    for mesh in (MeshConfig(data=1), MeshConfig(data=2, fsdp=2)):
        seen = states(mesh)
        expected = seen[0].params["model"]
        for number, after in enumerate(seen[1:]):
            decay = min(DECAY, (1 + number) / (10 + number))
            expected = jax.tree.map(
                lambda old, new, decay=decay: decay * old + (1 - decay) * new, expected, after.params["model"]
            )
            for left, right in zip(jax.tree.leaves(expected), jax.tree.leaves(after.smoothed), strict=True):
                np.testing.assert_allclose(left, right, atol=1e-6)


def test_it_does_not_touch_training() -> None:
    one, other = states(MeshConfig(data=1))[-1], states(MeshConfig(data=1), averaging=False)[-1]
    assert other.smoothed is None
    for left, right in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_array_equal(left, right)


def test_it_is_what_predicts_and_it_survives_a_restart(tmp_path: Path) -> None:
    state = replace(states(MeshConfig(data=1))[-1], step=jnp.int32(3))
    config = Config(model=MODEL, train=TrainingConfig(average_weights=DECAY, params_dtype="float32"))
    facts = {"epoch": 1.0, "metrics": {"MRR@10": 0.5}, "encoder": "e", "data_hash": "d"}
    saved = checkpoints.save(tmp_path, jax.device_put(state), config, facts)
    served = jax.tree.leaves(pure_params(checkpoints.load_model(tmp_path).model))
    for left, right in zip(served, jax.tree.leaves(state.smoothed), strict=True):
        np.testing.assert_array_equal(left, right)
    back, _ = checkpoints.restore(saved, fresh())
    for left, right in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(left, right)

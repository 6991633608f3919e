"""The step is pure, and the same on one device and on two."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prime_jax.config import MeshConfig, TrainingConfig
from prime_jax.errors import ConfigError
from prime_jax.losses.corpus import in_chunks
from prime_jax.models.prime import PredictorConfig
from prime_jax.train.optim import make_optimizer
from prime_jax.train.sharding import make_mesh, replicated, split_batch
from prime_jax.train.state import TrainState, build_graph, init_state
from prime_jax.train.step import make_train_step
from prime_jax.types import Batch

MODEL = PredictorConfig(
    input_dim=8, output_dim=8, hidden_dim=128, num_layers=1, num_heads=2, max_context_length=2, dropout=0.0
)


def batch(seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(8, 8)).astype(np.float32)
    target /= np.linalg.norm(target, axis=-1, keepdims=True)
    return Batch(
        context=rng.normal(size=(8, 2, 8)).astype(np.float32),
        context_mask=rng.random((8, 2)) < 0.7,
        query=rng.normal(size=(8, 8)).astype(np.float32),
        target=target,
        target_id=np.arange(8),
        positive_ids=np.arange(8)[:, None],
        example=np.arange(8),
    )


def run(
    devices: int, steps: int, dropout: float = 0.0, negatives: np.ndarray | None = None
) -> tuple[TrainState, list[float]]:
    """Steps of plain gradient descent, whose parameters show the gradient itself."""
    model = MODEL.model_copy(update={"dropout": dropout})
    optimizer = optax.sgd(0.1)
    mesh = make_mesh(MeshConfig(data=devices), 8)
    state = jax.device_put(init_state(model, optimizer, seed=0), replicated(mesh))
    corpus = None if negatives is None else jax.device_put(in_chunks(negatives, 7), replicated(mesh))
    graph = build_graph(model, jnp.float32)
    step = make_train_step(graph, optimizer, temperature=0.07, remat=False, corpus=corpus)
    losses = []
    for number in range(steps):
        state, metrics = step(state, split_batch(batch(number), mesh))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.parametrize("negatives", [None, np.random.default_rng(9).normal(size=(40, 8)).astype("f4")])
def test_two_devices_equal_one(negatives: np.ndarray | None) -> None:
    """In-batch negatives are global, corpus negatives everywhere, so splitting the batch changes nothing."""
    one, losses_of_one = run(1, 3, negatives=negatives)
    two, losses_of_two = run(2, 3, negatives=negatives)
    np.testing.assert_allclose(losses_of_one, losses_of_two, rtol=1e-5)
    for left, right in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)


def test_same_state_same_batch_same_result_and_other_dropout_next_step() -> None:
    first, again = run(1, 2, dropout=0.5), run(1, 2, dropout=0.5)
    assert first[1] == again[1]
    for left, right in zip(jax.tree.leaves(first[0]), jax.tree.leaves(again[0]), strict=True):
        np.testing.assert_array_equal(left, right)


def test_repeating_one_batch_learns_it() -> None:
    """From about chance (log 8) to nearly nothing."""
    config = TrainingConfig(learning_rate=1e-3, warmup_steps=0, weight_decay=0.0)
    optimizer = make_optimizer(config, 1000)
    state = init_state(MODEL, optimizer, seed=0)
    step = make_train_step(build_graph(MODEL, jnp.float32), optimizer, temperature=0.07, remat=True)
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch(0))
        losses.append(float(metrics["loss"]))
    assert losses[0] > 1.5
    assert losses[-1] < 0.05
    assert float(metrics["chance"]) == pytest.approx(np.log(8), rel=1e-5)
    assert int(state.step) == 60


@pytest.mark.parametrize(("devices", "rows"), [(3, 8), (99, 8), (0, 8), (2, 7)])
def test_a_mesh_that_does_not_fit_is_explained(devices: int, rows: int) -> None:
    with pytest.raises(ConfigError, match="devices"):
        make_mesh(MeshConfig(data=devices), rows)

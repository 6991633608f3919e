"""Single training steps on made-up batches, for the tests that compare one way of computing with another."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from prime_jax.config import MeshConfig
from prime_jax.losses.corpus import Corpus, in_chunks
from prime_jax.losses.objective import Objective
from prime_jax.models.prime import PredictorConfig
from prime_jax.train.sharding import make_mesh, split_batch, state_shardings
from prime_jax.train.state import TrainState, build_graph, init_state
from prime_jax.train.step import StepPlan, make_train_step
from prime_jax.types import Batch

DIM, ROWS = 8, 16
MODEL = PredictorConfig(
    input_dim=DIM,
    output_dim=DIM,
    hidden_dim=128,
    num_layers=2,
    num_heads=2,
    max_context_length=2,
    dropout=0.0,
)


def unit_rows(rng: np.random.Generator, *shape: int) -> np.ndarray:
    vectors = rng.normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def batch(seed: int, rows: int = ROWS, **fields: Any) -> Batch:
    rng = np.random.default_rng(seed)
    return Batch(
        context=rng.normal(size=(rows, 2, DIM)).astype(np.float32),
        context_mask=rng.random((rows, 2)) < 0.7,
        query=rng.normal(size=(rows, DIM)).astype(np.float32),
        target=unit_rows(rng, rows, DIM),
        target_id=np.arange(rows),
        positive_ids=np.stack([np.arange(rows), np.arange(rows) ^ 1], axis=1),
        example=np.arange(rows),
        **fields,
    )


def with_everything(seed: int, rows: int = ROWS) -> Batch:
    """A batch with explicit negatives and all right answers."""
    rng = np.random.default_rng(seed + 100)
    ids = rng.integers(-1, 40, size=(rows, 3))
    return batch(
        seed,
        rows,
        negatives=unit_rows(rng, rows, 3, DIM),
        negative_ids=ids,
        positives=unit_rows(rng, rows, 2, DIM),
    )


def passages() -> np.ndarray:
    return np.random.default_rng(9).normal(size=(41, DIM)).astype(np.float32)


def run(
    steps: int = 2,
    *,
    mesh: MeshConfig | None = None,
    objective: Objective | None = None,
    plan: StepPlan | None = None,
    optimizer: optax.GradientTransformation | None = None,
    corpus: bool = False,
    make: Any = batch,
    **model: Any,
) -> tuple[TrainState, list[dict[str, float]]]:
    """Steps of plain gradient descent, whose parameters show the gradient itself; state and metrics."""
    config = MODEL.model_copy(update=model)
    objective, optimizer, plan = objective or Objective(), optimizer or optax.sgd(0.1), plan or StepPlan(10)
    devices = make_mesh(mesh or MeshConfig(data=1), ROWS, plan.micro_batch)
    shardings = state_shardings(devices, jax.eval_shape(lambda: init_state(config, optimizer, 0, objective)))
    state = jax.device_put(init_state(config, optimizer, 0, objective), shardings)
    negatives: Corpus | None = in_chunks(passages(), 3, devices) if corpus else None
    step = make_train_step(build_graph(config, jnp.float32), optimizer, objective, plan, devices)
    told = []
    for number in range(steps):
        state, metrics = step(state, split_batch(make(number), devices), negatives)
        told.append({name: float(value) for name, value in metrics.items()})
    return state, told


@cache
def shared(**settings: Any) -> tuple[TrainState, list[dict[str, float]]]:
    """A run that several tests compare theirs with, computed once; nobody may change it."""
    return run(**settings)


def assert_same(
    one: tuple[TrainState, list[dict[str, float]]],
    other: tuple[TrainState, list[dict[str, float]]],
    tolerance: float = 1e-5,
) -> None:
    """Metrics and everything in the state agree."""
    for left, right in zip(one[1], other[1], strict=True):
        assert left.keys() == right.keys()
        for name in left:
            np.testing.assert_allclose(left[name], right[name], rtol=tolerance, atol=tolerance, err_msg=name)
    for left, right in zip(jax.tree.leaves(one[0]), jax.tree.leaves(other[0]), strict=True):
        np.testing.assert_allclose(np.asarray(left), np.asarray(right), rtol=tolerance, atol=tolerance)

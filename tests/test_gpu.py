"""What must also hold on a GPU: few programs, small ones, so that all of it ends within a minute there.

`PRIME_JAX_GPU_TESTS=cpu` runs these tests on a CPU: a dry run, so that they are known to work when a GPU
comes. `python -m benchmarks.gpu_tests` writes how long each took.
"""

import json
from pathlib import Path
from typing import Any

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from prime_jax.losses.objective import Objective
from prime_jax.models.prime import EmbeddingPredictor, PredictorConfig
from prime_jax.nn import attention
from prime_jax.nn.attention import attend
from prime_jax.predict.predictor import Predictor
from prime_jax.retrieval.topk import search
from prime_jax.train import memory
from prime_jax.train.state import MODEL, TrainState, build_graph, init_state
from prime_jax.train.step import StepPlan, make_train_step
from prime_jax.types import Batch

pytestmark = pytest.mark.gpu

ROWS, TURNS, SIZE = 8, 10, 32
SHAPE = PredictorConfig(
    input_dim=SIZE,
    output_dim=SIZE,
    hidden_dim=128,
    num_layers=2,
    num_heads=2,
    max_context_length=TURNS,
    max_batch_size=ROWS,
    residual="query",
    use_torch_compile=False,  # what a test does not call is not compiled
)


@pytest.fixture(scope="module")
def device() -> jax.Device:
    """The GPU; in a dry run the CPU that stands in for it."""
    return jax.devices()[0]


@pytest.fixture(scope="module")
def weights() -> Any:
    """Random weights, whatever the attention; the gate is open, so that the layers matter."""
    model = EmbeddingPredictor(SHAPE, rngs=nnx.Rngs(0))
    model.residual_gate[...] = 1.0
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@pytest.fixture(scope="module")
def vectors() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Context `[B, N, D]`, query and target `[B, D]`, unit vectors."""
    drawn = np.random.default_rng(0).normal(size=(ROWS, TURNS + 2, SIZE)).astype(np.float32)
    drawn /= np.linalg.norm(drawn, axis=-1, keepdims=True)
    return drawn[:, :TURNS], drawn[:, TURNS], drawn[:, TURNS + 1]


def predictor_with(weights: Any, mode: str) -> EmbeddingPredictor:
    config = SHAPE.model_copy(update={"context_attention": mode})
    model: EmbeddingPredictor = nnx.merge(build_graph(config, jnp.float32), weights)
    return model


def test_forward_and_gradient_on_the_gpu_equal_those_on_the_cpu(
    device: jax.Device, weights: Any, vectors: tuple[np.ndarray, ...]
) -> None:
    """In float32 with full-precision products."""
    context, query, target = vectors
    graph = build_graph(SHAPE, jnp.float32)

    @jax.jit
    def loss_and_gradient(params: Any, context: jax.Array, query: jax.Array) -> Any:
        return jax.value_and_grad(lambda params: jnp.sum(nnx.merge(graph, params)(context, query) * target))(
            params
        )

    results = []
    for where in (jax.devices("cpu")[0], device):
        arguments = jax.device_put((weights, context, query), where)
        with jax.default_matmul_precision("highest"):
            results.append(jax.tree.leaves(loss_and_gradient(*arguments)))
    for left, right in zip(*results, strict=True):
        np.testing.assert_allclose(np.asarray(left), np.asarray(right), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["full", "prefix", "causal"])
def test_predicting_on_the_gpu_in_every_precision(
    mode: str, weights: Any, vectors: tuple[np.ndarray, ...]
) -> None:
    """float32 equals the model to 1e-4, at once and turn by turn; bfloat16 points where float32 does."""
    context, query, _ = vectors
    model = predictor_with(weights, mode)
    with jax.default_matmul_precision("highest"):
        expected = np.asarray(jax.jit(model.__call__)(jnp.asarray(context), jnp.asarray(query)))
    exact = Predictor.from_model(model, precision="float32", batch_sizes=())
    np.testing.assert_allclose(exact.predict(context, query), expected, atol=1e-4)
    half = Predictor.from_model(model, precision="bfloat16", batch_sizes=())
    assert (half.predict(context, query) * expected).sum(axis=-1).min() > 0.999
    assert half.info()["precision"][ROWS]["dtype"] == "bfloat16"
    if mode == "full":
        np.testing.assert_allclose(exact.predict(context[:1], query[:1]), expected[:1], atol=1e-4)
    session = exact.session(ROWS)
    for turn in range(TURNS):
        session.append(context[:, turn])
        answer = session.predict(query)
    np.testing.assert_allclose(answer, expected, atol=1e-4)


def test_all_heads_in_one_product_equal_each_head_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention in bfloat16, forward and backward; padded turns are seen by neither."""
    heads = jnp.asarray(np.random.default_rng(0).normal(size=(3, ROWS, TURNS, 2, 64)).astype(np.float32))
    mask = jnp.asarray((np.arange(TURNS) < 1 + (np.arange(ROWS) % TURNS)[:, None])[:, None])

    def summed(heads: jax.Array) -> tuple[jax.Array, jax.Array]:
        mixed = attend(*heads, jnp.broadcast_to(mask, (ROWS, TURNS, TURNS)), jnp.bfloat16)
        return jnp.sum(jnp.sin(3 * mixed)), mixed

    found = []
    for joined in (False, True):
        monkeypatch.setattr(attention, "on_gpu", lambda joined=joined: joined)
        found.append(jax.jit(jax.value_and_grad(summed, has_aux=True))(heads))
    ((_, plain), slope), ((_, together), other_slope) = found
    np.testing.assert_allclose(plain, together, atol=2e-2)
    np.testing.assert_allclose(slope, other_slope, atol=5e-2)


def test_gradients_of_a_step_in_bfloat16_point_where_those_in_float32_do(
    vectors: tuple[np.ndarray, ...],
) -> None:
    """The real step, dropout included, with plain gradient descent at rate 1: a step is its gradient."""
    rows = 256
    drawn = np.random.default_rng(1).normal(size=(rows, TURNS + 2, SIZE)).astype(np.float32)
    drawn /= np.linalg.norm(drawn, axis=-1, keepdims=True)
    ids = np.arange(rows)
    batch = Batch(
        context=drawn[:, :TURNS],
        context_mask=np.arange(TURNS) < (ids % (TURNS + 1))[:, None],
        query=drawn[:, TURNS],
        target=drawn[:, TURNS + 1],
        target_id=ids,
        positive_ids=ids[:, None],
        example=ids,
    )
    config = SHAPE.model_copy(update={"residual": "none"})
    start: TrainState = jax.jit(lambda: init_state(config, optax.sgd(1.0), 0))()
    before = jax.tree.map(np.asarray, start.params[MODEL])
    gradients = []
    for dtype in (jnp.float32, jnp.bfloat16):
        step = make_train_step(build_graph(config, dtype), optax.sgd(1.0), Objective(), StepPlan(10))
        after, metrics = step(jax.tree.map(jnp.copy, start), batch)
        assert bool(metrics["finite"])
        gradients.append(jax.tree.map(lambda old, new: old - np.asarray(new), before, after.params[MODEL]))
    paths = jax.tree_util.tree_leaves_with_path(gradients[0])
    for (path, exact), half in zip(paths, jax.tree.leaves(gradients[1]), strict=True):
        cosine = float((exact * half).sum() / (np.linalg.norm(exact) * np.linalg.norm(half)))
        assert cosine >= 0.999, f"{jax.tree_util.keystr(path)}: {cosine}"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_exact_search_on_the_gpu_equals_numpy(dtype: str) -> None:
    """Over several chunks and a partial one; the same rows, scores as numpy has them in float64."""
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(5, SIZE)).astype(np.float32)
    corpus = rng.normal(size=(300, SIZE)).astype(dtype)
    scores, rows = search(queries, corpus, 10, corpus_chunk=128)
    every = queries.astype(np.float64) @ corpus.astype(np.float64).T
    order = np.argsort(-every, axis=1, kind="stable")[:, :10]
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(scores, np.take_along_axis(every, order, axis=1), rtol=1e-5)


def test_training_on_the_gpu_learns_in_bfloat16_and_tells_its_memory(
    device: jax.Device, tmp_path: Path
) -> None:
    """A real run with cached gradients and remat; the device says how much memory it has."""
    pytest.importorskip("ir_measures", reason="validation needs it")
    from prime_jax.train.__main__ import main

    fakes.write_conversations(tmp_path / "data")
    options = [
        *("--model.input-dim", f"{fakes.DIM}", "--model.output-dim", f"{fakes.DIM}"),
        *("--model.hidden-dim", "128", "--model.num-heads", "4", "--model.num-layers", "1"),
        *("--data.encoder", "fakes:encoder", "--data.path", str(tmp_path / "data")),
        *("--train.num-epochs", "8", "--train.eval-every-epochs", "8", "--train.learning-rate", "0.003"),
        *("--train.batch-size", "8", "--train.micro-batch-size", "4", "--train.warmup-steps", "2"),
        *("--mesh.data", "1"),
    ]
    run = tmp_path / "run"
    assert main([*options, "--out", str(run)]) == 0
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    limit = memory.available(device)
    assert limit is not None
    assert limit > 2**30

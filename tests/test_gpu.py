"""What must also hold on a GPU."""

import json
from pathlib import Path

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prime_jax.models.prime import EmbeddingPredictor, PredictorConfig
from prime_jax.predict.predictor import Predictor
from prime_jax.train import memory
from prime_jax.train.__main__ import main

pytestmark = pytest.mark.gpu


def test_forward_and_gradient_on_the_gpu_equal_those_on_the_cpu() -> None:
    """In float32 with full-precision products."""
    config = PredictorConfig(input_dim=64, output_dim=64, hidden_dim=256, num_layers=2, residual="query")
    graph, params = nnx.split(EmbeddingPredictor(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    context = rng.normal(size=(8, 10, 64)).astype(np.float32)
    query = rng.normal(size=(8, 64)).astype(np.float32)
    target = rng.normal(size=(8, 64)).astype(np.float32)

    def loss(params: nnx.State) -> jax.Array:
        return jnp.sum(nnx.merge(graph, params)(jnp.asarray(context), jnp.asarray(query)) * target)

    results = []
    for platform in ("cpu", "gpu"):
        device = jax.devices(platform)[0]
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            results.append(jax.tree.leaves(jax.value_and_grad(loss)(jax.device_put(params, device))))
    for left, right in zip(*results, strict=True):
        np.testing.assert_allclose(np.asarray(left), np.asarray(right), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["full", "prefix", "causal"])
def test_predicting_on_the_gpu_in_every_precision(mode: str) -> None:
    """float32 equals the model to 1e-4; bfloat16, however it is computed, points where float32 does."""
    config = PredictorConfig(
        input_dim=64,
        output_dim=64,
        hidden_dim=256,
        num_layers=2,
        context_attention=mode,
        use_torch_compile=False,
    )
    model = EmbeddingPredictor(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    context = rng.normal(size=(40, 10, 64)).astype(np.float32)
    query = rng.normal(size=(40, 64)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        expected = np.asarray(model(jnp.asarray(context), jnp.asarray(query)))
    exact = Predictor.from_model(model, precision="float32")
    half = Predictor.from_model(model, precision="bfloat16")
    np.testing.assert_allclose(exact.predict(context, query), expected, atol=1e-4)
    assert (half.predict(context, query) * expected).sum(axis=-1).min() > 0.999
    assert half.info()["precision"][32]["why"].startswith("set by hand; measured")
    session = exact.session(40)
    for turn in range(10):
        session.append(context[:, turn])
        session.predict(query)
    np.testing.assert_allclose(session.predict(query), expected, atol=1e-4)


def test_training_on_the_gpu_learns_in_bfloat16_and_tells_its_memory(tmp_path: Path) -> None:
    """A real run with cached gradients and remat; the device says how much memory it has."""
    fakes.write_conversations(tmp_path / "data")
    options = [
        *("--model.input-dim", f"{fakes.DIM}", "--model.output-dim", f"{fakes.DIM}"),
        *("--model.hidden-dim", "128", "--model.num-heads", "4", "--data.encoder", "fakes:encoder"),
        *("--data.path", str(tmp_path / "data"), "--train.num-epochs", "8", "--train.learning-rate", "0.003"),
        *("--train.batch-size", "8", "--train.micro-batch-size", "4", "--train.warmup-steps", "2"),
    ]
    run = tmp_path / "run"
    assert main([*options, "--out", str(run)]) == 0
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    limit = memory.available(jax.devices("gpu")[0])
    assert limit is not None
    assert limit > 2**30

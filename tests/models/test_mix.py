"""The model without layers: what it computes by hand, in every runtime, in sessions, and when trained."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
import torch
from flax import nnx
from predictors import D, N, requests, session
from pydantic import ValidationError

import prime_jax
from prime_jax.errors import PredictorError
from prime_jax.export.bundle import write_bundle
from prime_jax.export.from_torch import from_torch
from prime_jax.export.golden import module_of
from prime_jax.export.to_torch import state_dict
from prime_jax.models.mix import MixConfig, MixPredictor, mix_of
from prime_jax.predict.predictor import Predictor
from prime_jax.retrieval.mix import RecencyMix

EAST, NORTH, UP = np.eye(3, dtype=np.float32)
CASES: list[dict[str, Any]] = [
    {},
    {"average": True},
    {"linear": "query"},
    {"linear": "context"},
    {"linear": "context", "keep_query": False},
]


def mixed(seed: int = 0, **fields: Any) -> MixPredictor:
    """A small model whose every number counts."""
    shape = {"input_dim": D, "output_dim": D, "max_context_length": N, "use_torch_compile": False}
    model = MixConfig(**(shape | fields)).build(rngs=nnx.Rngs(0))
    rng = np.random.default_rng(seed)
    model.turn_weights.set_value(jnp.asarray(rng.uniform(0, 1, N), jnp.float32))
    if hasattr(model, "linear_map"):
        for part in (model.linear_map.kernel, model.linear_map.bias):
            part.set_value(jnp.asarray(rng.normal(0, 0.2, part.shape), jnp.float32))
    return model


def test_turns_count_by_their_age_whatever_their_length() -> None:
    model = MixConfig(input_dim=3, output_dim=3, max_context_length=3).build(rngs=nnx.Rngs(0))
    context = jnp.asarray(np.stack([5 * NORTH, 0.1 * UP, np.full(3, np.nan)]))[None]
    query = jnp.asarray(EAST)[None]
    found = model(context, 2 * query, jnp.array([[True, True, False]]))
    expected = np.array([1, 0.15, 0.3])  # untrained: weight .3, decay .5
    np.testing.assert_allclose(found[0], expected / np.linalg.norm(expected), atol=1e-6)
    alone = model(context[:, :0], query)
    np.testing.assert_array_equal(alone[0], EAST)


def test_the_mean_and_the_maps_by_hand() -> None:
    shape = {"input_dim": 3, "output_dim": 3, "max_context_length": 2}
    context, query = jnp.asarray([[NORTH, UP]]), jnp.asarray([EAST])
    mean = MixConfig(**shape, average=True).build(rngs=nnx.Rngs(0))
    mean.turn_weights.set_value(jnp.full(2, 2.0))
    np.testing.assert_allclose(mean(context, query)[0], np.ones(3) / np.sqrt(3), atol=1e-6)
    linear = MixConfig(**shape, linear="context", keep_query=False).build(rngs=nnx.Rngs(0))
    kernel = np.zeros((9, 3), np.float32)
    kernel[0] = EAST  # of the query
    kernel[3:6] = 2 * np.eye(3)  # of the mean turn
    kernel[6:] = np.eye(3)  # of the newest one
    linear.linear_map.kernel.set_value(jnp.asarray(kernel))
    np.testing.assert_allclose(linear(context, query)[0], np.array([1, 1, 2]) / np.sqrt(6), atol=1e-6)


def test_it_is_the_mix_that_the_guard_and_the_baseline_compute() -> None:
    context, query, mask = requests(20)
    model = mix_of(MixConfig(input_dim=D, output_dim=D, max_context_length=N), 0.7, 0.4)
    expected = RecencyMix(0.7, 0.4)(context, mask, query)
    found = model(*map(jnp.asarray, (context, query, mask)))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("fields", [{"output_dim": 4}, {"keep_query": False}, {"linear": "words"}])
def test_configurations_that_make_no_sense_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        MixConfig(**{"input_dim": 3, "output_dim": 3, **fields})


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_every_runtime_gives_the_same(fields: dict[str, Any], tmp_path: Path) -> None:
    model, (context, query, mask) = mixed(**fields), requests(12)
    expected = np.asarray(model(*map(jnp.asarray, (context, query, mask))))
    write_bundle(model, tmp_path / "bundle", facts={"encoder": "some encoder"})
    loaded = prime_jax.load(tmp_path / "bundle")
    np.testing.assert_allclose(loaded.predict(context, query, mask), expected, atol=1e-6)
    by_onnx: onnxruntime.InferenceSession = session(tmp_path / "bundle" / "model.onnx")
    feeds = {"context": context, "query": query, "context_mask": mask}
    np.testing.assert_allclose(by_onnx.run(None, feeds)[0], expected, atol=1e-5)
    runtime = module_of((tmp_path / "bundle" / "torch_runtime.py").read_text(), "torch_runtime.py")
    module = runtime.load_bundle(tmp_path / "bundle")
    with torch.inference_mode():
        found = module(*map(torch.from_numpy, (context, query, mask)))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    assert module.get_num_params() == model.num_params()
    back = from_torch(dict(module.state_dict()), model.config)
    for name, tensor in state_dict(model).items():
        np.testing.assert_array_equal(state_dict(back)[name], tensor)
    assert "no layers" in (tmp_path / "bundle" / "MODEL_CARD.md").read_text()


def test_the_card_of_what_was_not_trained_says_so(tmp_path: Path) -> None:
    write_bundle(mixed(), tmp_path / "bundle", facts={"trained": False})
    card = (tmp_path / "bundle" / "MODEL_CARD.md").read_text()
    assert "Nothing was trained" in card
    assert "no data was trained on" in card
    assert "embeddings of one encoder, whichever it is" in card


def test_the_torch_module_refuses_what_does_not_fit(tmp_path: Path) -> None:
    write_bundle(mixed(), tmp_path / "bundle", facts={})
    runtime = module_of((tmp_path / "bundle" / "torch_runtime.py").read_text(), "torch_runtime.py")
    module = runtime.load_bundle(tmp_path / "bundle")
    for turns, width, message in ((N + 1, D, "at most"), (N, D + 1, "has dimension")):
        with pytest.raises(runtime.PredictorError, match=message):
            module(torch.zeros(2, turns, width), torch.zeros(2, D))
    config = tmp_path / "config.json"
    config.write_text('{"model": {"kind": "text"}}')
    with pytest.raises(runtime.CheckpointError, match="kind mix"):
        runtime.MixConfig.from_json(config)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_session_answers_as_predict_does(batch: int) -> None:
    predictor = Predictor.from_model(mixed(linear="context"))
    talk, rng = predictor.session(batch), np.random.default_rng(0)
    for turn in range(N + 2):
        query = rng.normal(size=(batch, D)).astype(np.float32)
        np.testing.assert_allclose(
            talk.predict(query), predictor.predict(talk.window()[0], query, talk.window()[1]), atol=1e-6
        )
        rows = rng.random(batch) < 0.7
        talk.append(rng.normal(size=(batch, D)).astype(np.float32), rows if turn else None)
    saved = talk.save()
    other = predictor.session(batch)
    other.restore(saved)
    np.testing.assert_array_equal(other.window()[0], talk.window()[0])
    talk.prepare()
    with pytest.raises(PredictorError, match="NaN"):
        talk.predict(np.full((batch, D), np.nan, np.float32))

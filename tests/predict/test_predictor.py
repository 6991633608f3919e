"""Prediction from Python: any batch, any N, the same answer; bad input is named."""

import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import monitoring

import prime_jax
from prime_jax.errors import CheckpointError, PredictorError, WrongAnswerError
from prime_jax.models.prime import EmbeddingPredictor, PredictorConfig
from prime_jax.predict import precision
from prime_jax.predict.predictor import Predictor

CONFIG = PredictorConfig(
    input_dim=8,
    output_dim=8,
    hidden_dim=128,
    num_layers=1,
    num_heads=2,
    max_context_length=3,
    max_batch_size=4,
    residual="query",
    use_torch_compile=False,
)


def make(**fields: Any) -> Predictor:
    model = EmbeddingPredictor(CONFIG.model_copy(update=fields), rngs=nnx.Rngs(0))
    model.residual_gate[...] = jnp.float32(0.5)
    return Predictor.from_model(model)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return make()


def inputs(rows: int, turns: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rows * 10 + turns)
    return (
        rng.normal(size=(rows, turns, 8)).astype(np.float32),
        rng.normal(size=(rows, 8)).astype(np.float32),
    )


@pytest.mark.parametrize("rows", [0, 1, 2, 4, 5, 11])
@pytest.mark.parametrize("turns", range(4))
def test_every_batch_and_every_length_equals_the_model(predictor: Predictor, rows: int, turns: int) -> None:
    """Padded to compiled shapes and cut into chunks, yet every row comes back as the model gives it."""
    context, query = inputs(rows, turns)
    answers = predictor.predict(context, query)
    assert answers.shape == (rows, 8)
    for row in range(rows):
        alone = predictor.model(jnp.asarray(context[row : row + 1]), jnp.asarray(query[row : row + 1]))
        np.testing.assert_allclose(answers[row], alone[0], atol=1e-5)


def test_one_request_without_a_batch_axis(predictor: Predictor) -> None:
    context, query = inputs(2)
    mask = np.array([True, False, True])
    np.testing.assert_allclose(
        predictor.predict(context[0], query[0]), predictor.predict(context, query)[0], atol=1e-5
    )
    np.testing.assert_allclose(
        predictor.predict(context[1], query[1], mask),
        predictor.predict(context[1:, [0, 2]], query[1:])[0],
        atol=1e-5,
    )


def test_jax_arrays_float64_and_float16_are_taken(predictor: Predictor) -> None:
    context, query = inputs(2)
    expected = predictor.predict(context, query)
    np.testing.assert_array_equal(predictor.predict(jnp.asarray(context), jnp.asarray(query)), expected)
    np.testing.assert_array_equal(
        predictor.predict(context.astype(np.float64), query.astype(np.float64)), expected
    )
    np.testing.assert_allclose(predictor.predict(context.astype(np.float16), query), expected, atol=1e-2)


def test_padded_turns_may_hold_anything(predictor: Predictor) -> None:
    context, query = inputs(2)
    mask = np.array([[True, True, False]] * 2)
    garbage = context.copy()
    garbage[:, 2] = np.nan
    np.testing.assert_array_equal(
        predictor.predict(garbage, query, mask), predictor.predict(context, query, mask)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, q: (c[:, :, :7], q), "do not have the shapes"),
        (lambda c, q: (c, q[:, :7]), "do not have the shapes"),
        (lambda c, q: (c[:1], q), "do not have the shapes"),
        (lambda c, q: (c[0], q), "do not have the shapes"),
        (lambda c, q: (np.concatenate([c, c], axis=1), q), "6 turns, the model takes at most 3"),
        (lambda c, q: (c.astype(int), q), "context has dtype int64, expected floating-point"),
        (lambda c, q: (c, q.astype(str)), "query has dtype <U32, expected floating-point"),
        (lambda c, q: (c, q + np.array([[0], [np.nan]])), r"query\[1\] holds NaN or Inf"),
        (lambda c, q: (c * np.array([[[1], [np.inf], [1]]] * 2), q), r"context\[0, 1\] holds NaN or Inf"),
        (lambda c, q: (c, q * np.array([[1], [0]])), r"query\[1\] has norm 0, which no embedding has"),
        (lambda c, q: (c, q * np.array([[1], [1e-30]])), r"query\[1\] has norm .*e-30"),
        (lambda c, q: (c, q * np.array([[1e12], [1]])), r"query\[0\] has norm .*e\+12"),
        (lambda c, q: (c * 1e22, q), r"context\[0, 0\] has norm .*e\+22.* right dtype and byte order"),
        (lambda c, q: (c, q.astype(">f4").view("<f4") * 1.0), r"query\[0\] (has norm|holds NaN)"),
        (lambda c, q: (c, q, np.ones((2, 2), bool)), "context_mask is bool"),
        (lambda c, q: (c, q, np.ones((2, 3), int)), "context_mask is int64"),
        (lambda c, q: ([[1.0], [2.0, 3.0]], q), "context is not an array"),
    ],
)
def test_bad_input_is_named(predictor: Predictor, change: Any, message: str) -> None:
    with pytest.raises(PredictorError, match=message):
        predictor.predict(*change(*inputs(2)))


def test_nothing_is_compiled_after_the_warm_up() -> None:
    """Counted by JAX itself, sessions included."""
    predictor = make(use_torch_compile=True, context_attention="causal")
    session = predictor.session(2)
    compilations: list[str] = []

    def listen(event: str, seconds: float, **_: object) -> None:
        if event.endswith("backend_compile_duration"):
            compilations.append(event)

    jax.jit(lambda x: x + 1)(jnp.ones(7))  # whatever converting arrays itself compiles, once per process
    predictor.predict(*inputs(1, 1))
    monitoring.register_event_duration_secs_listener(listen)
    try:
        for rows in (1, 2, 3, 4, 9):
            for turns in range(4):
                predictor.predict(*inputs(rows, turns))
        for _ in range(5):
            session.append(inputs(2)[1])
            session.predict(inputs(2)[1])
            session.append(inputs(2)[1], np.array([True, False]))
        predictor.session(2).predict(inputs(2)[1])
        assert compilations == []
        jax.jit(lambda x: x * 31.5)(jnp.ones(11))
        assert compilations != []  # the listener does listen
    finally:
        monitoring.unregister_event_duration_listener(listen)


def test_batch_sizes_can_be_chosen() -> None:
    predictor = make(max_batch_size=6)
    assert predictor.info()["batch_shapes"] == [1, 6]
    chosen = Predictor.from_model(predictor.model, batch_sizes=(3, 2, 50))
    assert chosen.info()["batch_shapes"] == [2, 3, 6]
    np.testing.assert_allclose(chosen.predict(*inputs(8)), predictor.predict(*inputs(8)), atol=1e-6)
    with pytest.raises(PredictorError, match=r"batch_sizes \[0\] must be 1 or more"):
        Predictor.from_model(predictor.model, batch_sizes=(0,))


def test_precision_is_measured_for_each_shape_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model as small as this one would not be measured, were it not made to."""
    monkeypatch.setattr(precision, "MEASURED_FROM", 0)
    predictor = make(use_torch_compile=True)
    told = predictor.info()["precision"]
    assert set(told) == {1, 4}
    for shape in told.values():
        assert shape["why"].startswith("measured: float32")
        assert "ms, bfloat16" in shape["why"]
    exact = make().predict(*inputs(4))
    assert (predictor.predict(*inputs(4)) * exact).sum(axis=-1).min() > 0.999
    recipes = {(shape["dtype"], shape["attention"], shape["outputs_first"]) for shape in told.values()}
    assert {tuple(recipe) for recipe in predictor._programs.recipes} == recipes  # the slower ones are gone


def test_bfloat16_by_hand() -> None:
    predictor = Predictor.from_model(make().model, precision="bfloat16")
    answers, exact = predictor.predict(*inputs(3)), make().predict(*inputs(3))
    assert predictor.info()["precision"][4]["dtype"] == "bfloat16"
    assert (answers * exact).sum(axis=-1).min() > 0.999
    assert np.abs(answers - exact).max() > 1e-6
    flexible = Predictor.from_model(make(use_static_cache=False).model, precision="bfloat16")
    np.testing.assert_allclose(flexible.predict(*inputs(3)), answers, atol=1e-2)


@pytest.mark.usefixtures("as_users_run_it")
def test_an_unknown_precision_is_refused_at_once() -> None:
    with pytest.raises(PredictorError, match="precision 'int8' is unknown"):
        Predictor.from_model(make().model, precision="int8")  # type: ignore[arg-type]


def test_threads_may_predict_at_once() -> None:
    predictor = make()
    expected = {rows: make().predict(*inputs(rows)) for rows in range(1, 7)}
    answers: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda rows=rows: answers.update({rows: predictor.predict(*inputs(rows))}))
        for rows in expected
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rows, rows_expected in expected.items():
        np.testing.assert_array_equal(answers[rows], rows_expected)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_every_compile_mode_gives_the_same_answer(predictor: Predictor, mode: str) -> None:
    other = make(compile_mode=mode)
    np.testing.assert_allclose(other.predict(*inputs(2)), predictor.predict(*inputs(2)), atol=1e-6)


def test_without_fixed_shapes_requests_run_as_they_are(predictor: Predictor) -> None:
    exact = make(use_static_cache=False)
    np.testing.assert_allclose(exact.predict(*inputs(3, 2)), predictor.predict(*inputs(3, 2)), atol=1e-6)
    assert exact._programs.shapes == {(3, 2)}


def test_info_says_what_is_served(predictor: Predictor) -> None:
    info = predictor.info()
    assert info["parameters"] == predictor.model.num_params()
    assert info["batch_shapes"] == [1, 4]
    assert info["model"]["residual"] == "query"


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        prime_jax.load(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        prime_jax.load(tmp_path)


def test_a_bad_row_of_a_large_batch_is_named_by_its_place_in_all_of_it(predictor: Predictor) -> None:
    """The program says that one is bad; it is the third row of the third chunk."""
    context, query = inputs(11)
    query[10] = np.nan
    with pytest.raises(PredictorError, match=r"query\[10\] holds NaN"):
        predictor.predict(context, query)
    query[10], context[9, 1] = 1, np.inf
    with pytest.raises(PredictorError, match=r"context\[9, 1\] holds NaN"):
        predictor.predict(context, query)


def test_what_an_earlier_request_left_in_a_buffer_does_not_show(predictor: Predictor) -> None:
    """Buffers are used again: a refused request and a longer one came before."""
    context, query = inputs(4)
    expected = make().predict(context[:3, :2], query[:3])
    with pytest.raises(PredictorError, match="holds NaN"):
        predictor.predict(np.full_like(context, np.nan), np.full_like(query, np.nan))
    np.testing.assert_array_equal(predictor.predict(context[:3, :2], query[:3]), expected)


def test_raw_embeddings_of_any_honest_norm_pass(predictor: Predictor) -> None:
    context, query = inputs(4)
    for scale in (1e-4, 1e-2, 30, 3_000):
        answers = predictor.predict(scale * context, scale * query)
        np.testing.assert_allclose(np.linalg.norm(answers, axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(
            answers, predictor.model(*map(jnp.asarray, (scale * context, scale * query))), atol=1e-5
        )


def test_an_ablation_may_ask_without_a_query(predictor: Predictor) -> None:
    context, query = inputs(2)
    answers = predictor.predict(context, 0 * query, zero_query=True)
    expected = predictor.model(jnp.asarray(context), jnp.zeros_like(query))
    np.testing.assert_allclose(answers, expected, atol=1e-5)
    with pytest.raises(PredictorError, match=r"query\[0\] holds NaN"):
        predictor.predict(context, np.nan * query, zero_query=True)
    with pytest.raises(PredictorError, match=r"context\[0, 0\] has norm"):
        predictor.predict(1e20 * context, 0 * query, zero_query=True)


def test_an_answer_that_is_no_unit_vector_is_refused() -> None:
    """Finite weights, as they are found in damaged files, may still give nothing."""
    model = EmbeddingPredictor(CONFIG.model_copy(update={"residual": "none"}), rngs=nnx.Rngs(0))
    model.output_proj.kernel[...] *= 0
    with pytest.raises(WrongAnswerError, match="the answer to request 0 is no unit vector"):
        Predictor.from_model(model).predict(*inputs(2))


def test_answers_are_the_callers_own(predictor: Predictor) -> None:
    answers = predictor.predict(*inputs(2))
    kept = answers.copy()
    predictor.predict(*inputs(2, 1))
    np.testing.assert_array_equal(answers, kept)
    answers[:] = 0  # may be written to
    assert answers.flags.c_contiguous

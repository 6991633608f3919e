"""The compiled passes give the model's own numbers, whatever a conversation's cache holds already."""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from predictors import LLAMA, D, N, make, requests

from prime_jax.models.prime import EmbeddingPredictor
from prime_jax.nn import attention
from prime_jax.predict import forward as subject
from prime_jax.predict.forward import advance, affine, empty_cache, forward
from prime_jax.predict.weights import Affine, lay_out

MODES = ("full", "prefix", "causal")
SHAPES = [
    {"context_attention": mode, "residual": residual, "num_layers": layers}
    for mode, residual, layers in itertools.product(MODES, ("none", "query", "linear"), (1, 3))
]
SHAPES += [
    {"context_attention": mode, "residual": "copy", "num_layers": layers, **LLAMA}
    for mode, layers in (("full", 1), ("full", 3), ("prefix", 2), ("causal", 2))
]


def name(fields: dict[str, Any]) -> str:
    return "-".join(str(value) for value in list(fields.values())[:4])


def expected(
    model: EmbeddingPredictor, context: np.ndarray, query: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    return np.asarray(model(jnp.asarray(context), jnp.asarray(query), jnp.asarray(mask)))


def left_aligned(context: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The real turns first, in their order, as a session keeps them."""
    order = np.argsort(~mask, axis=1, kind="stable")
    return np.take_along_axis(context, order[..., None], axis=1)


@pytest.mark.parametrize("fields", SHAPES, ids=name)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_forward_equals_the_model(fields: dict[str, Any], dtype: Any, tolerance: float) -> None:
    model = make(**fields)
    answers = forward(
        lay_out(model, dtype), *map(jnp.asarray, requests(7)), config=model.config, attention="float32"
    )
    np.testing.assert_allclose(answers, expected(model, *requests(7)), atol=tolerance)


@pytest.mark.parametrize("fields", SHAPES, ids=name)
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_the_gpus_way_equals_the_model(
    fields: dict[str, Any], batch: int, dtype: Any, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of several rows where one would do, and all heads in one product."""
    for module in (subject, attention):
        monkeypatch.setattr(module, "on_gpu", lambda: True)
    model = make(**fields)
    answers = forward(
        lay_out(model, dtype), *map(jnp.asarray, requests(batch)), config=model.config, attention=dtype
    )
    np.testing.assert_allclose(answers, expected(model, *requests(batch)), atol=tolerance)


def test_max_delta_holds_in_the_compiled_pass() -> None:
    model = make(residual="query", max_delta=0.2)
    inputs = requests(7)
    answers = forward(
        lay_out(model, "float32"), *map(jnp.asarray, inputs), config=model.config, attention="float32"
    )
    np.testing.assert_allclose(answers, expected(model, *inputs), atol=1e-5)


@pytest.mark.parametrize("fields", SHAPES, ids=name)
def test_turns_added_bit_by_bit_give_the_whole_windows_answer(fields: dict[str, Any]) -> None:
    """Row i starts with i turns; then 0, 1 or 2 more come, differently in each row."""
    model = make(**fields)
    weights, config = lay_out(model, "float32"), model.config
    context, query, _ = requests(3)
    context = np.nan_to_num(context, nan=0.5)
    query = jnp.asarray(query)
    held, more = np.array([0, 1, 2]), np.array([2, 0, 1])

    def check(cache: Any, turns: np.ndarray, start: np.ndarray, count: np.ndarray) -> Any:
        answer, cache = advance(
            weights,
            cache,
            jnp.asarray(turns),
            jnp.asarray(start),
            jnp.asarray(count),
            query,
            config=config,
            attention="float32",
        )
        whole = expected(model, context, query, np.arange(N) < (start + count)[:, None])
        np.testing.assert_allclose(answer, whole, atol=1e-5)
        return cache

    zeros = np.zeros(3, int)
    cache = check(empty_cache(config, 3), context, zeros, held)
    cache = check(cache, context[:, :0], held, zeros)
    if config.context_attention == "prefix":
        check(cache, context, zeros, held + more)
        return
    added = np.stack([context[row, held[row] : held[row] + 2] for row in range(3)])
    added[1] = np.nan  # this row gets none, so what stands here must not matter
    cache = check(cache, added, held, more)
    check(cache, context[:, :0], held + more, zeros)


@pytest.mark.parametrize("rows", [*range(1, 14), 24, 25, 64])
def test_products_of_any_number_of_rows(rows: int) -> None:
    """Rows are padded for bfloat16 on CPUs; nothing of that may show."""
    rng = np.random.default_rng(rows)
    x = rng.integers(-3, 4, size=(rows, 1, D)).astype(np.float32)
    kernel = rng.integers(-3, 4, size=(D, 5)).astype(np.float32)
    bias = np.arange(5, dtype=np.float32)
    half = Affine(jnp.asarray(kernel.T, jnp.bfloat16), jnp.asarray(bias), True)
    np.testing.assert_array_equal(affine(jnp.asarray(x), half), x @ kernel + bias)


@pytest.mark.parametrize("fields", [{"residual": "linear"}, {"residual": "copy", **LLAMA}])
def test_float32_with_outputs_first_is_float32(fields: dict[str, Any]) -> None:
    """Where that is faster: the same numbers in another place, and the same answers."""
    model = make(**fields)
    plain, turned = lay_out(model, "float32"), lay_out(model, "float32", outputs_first=True)
    for left, right in zip(plain.layers, turned.layers, strict=True):
        np.testing.assert_array_equal(left.in_proj.kernel, right.in_proj.kernel.T)
        np.testing.assert_array_equal(left.mlp_out.kernel, right.mlp_out.kernel.T)
        assert right.mlp_out.kernel.dtype == jnp.float32
    answers = forward(turned, *map(jnp.asarray, requests(7)), config=model.config, attention="float32")
    np.testing.assert_allclose(answers, expected(model, *requests(7)), atol=1e-5)


def test_float32_weights_are_not_copied_but_where_they_are_split() -> None:
    model = make(num_layers=2)
    weights = lay_out(model, "float32")
    assert weights.layers[0].in_proj.kernel is model.layers[0].attention.in_proj.kernel[...]
    assert weights.layers[1].in_proj.kernel.shape == (128, 256)
    assert weights.layers[1].query is not None
    assert weights.layers[1].query.kernel.shape == (128, 128)

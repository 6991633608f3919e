"""A model without one of its parts, and the report of it."""

import jax.numpy as jnp
import numpy as np
import pytest
from predictors import make

from prime_jax.evaluate.ablation import ablated, without_residual
from prime_jax.evaluate.arrays import Split
from prime_jax.predict.predictor import Predictor

D, N, QUERIES = 24, 4, 6


@pytest.fixture(scope="module")
def split() -> Split:
    rng = np.random.default_rng(0)
    context, query = rng.normal(size=(QUERIES, N, D)), rng.normal(size=(QUERIES, D))
    mask = np.arange(N) < rng.integers(1, N + 1, (QUERIES, 1))
    return Split(query.astype(np.float32), context.astype(np.float32), mask, [np.array([0])] * QUERIES)


@pytest.mark.parametrize("residual", ["none", "query", "copy", "linear"])
def test_parts_are_taken_away(residual: str, split: Split) -> None:
    predictor = Predictor.from_model(make(residual=residual, use_torch_compile=False), precision="float32")
    found = ablated(predictor, split, seed=0)
    assert ("no residual" in found) == (residual != "none")
    assert ("no linear map" in found) == (residual == "linear")
    empty = predictor.predict(np.zeros((QUERIES, 0, D)), split.query)
    np.testing.assert_allclose(found["no context"], empty, atol=1e-6)
    whole = predictor.predict(split.context, split.query, split.mask)
    for vectors in found.values():
        assert np.abs(vectors - whole).max(axis=1).min() > 1e-4  # nobody keeps his own turns either
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("gate", [0.7, -0.7])
@pytest.mark.parametrize("residual", ["query", "copy"])
def test_what_the_network_adds_is_the_difference_to_the_residual(
    residual: str, gate: float, split: Split
) -> None:
    model = make(residual=residual, use_torch_compile=False)
    inputs = (jnp.asarray(split.context), jnp.asarray(split.query), jnp.asarray(split.mask))
    model.residual_gate[...] = jnp.float32(0.0)
    base = model(*inputs)
    model.residual_gate[...] = jnp.float32(gate)
    whole, alone = model(*inputs), without_residual(model)(*inputs)
    # The whole lies in the plane of base and what is added: subtract its part along the base.
    for row in range(QUERIES):
        plane = np.stack([base[row], alone[row]], axis=1)
        shares = np.linalg.lstsq(plane, np.asarray(whole[row]), rcond=None)[0]
        np.testing.assert_allclose(plane @ shares, whole[row], atol=1e-5)
        assert shares[1] > 0

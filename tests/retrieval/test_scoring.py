"""The steps of exact search: the best of a tile, and float32 queries as pairs of halves."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prime_jax.retrieval.scoring import device_magnitude, exact_top_k, magnitude, merging, split_queries


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    columns=st.sampled_from([1, 16, 100, 256, 1024]),
    k=st.sampled_from([1, 2, 7, 10, 16]),
    values=st.sampled_from([2, 5, 1000]),
)
def test_the_best_by_groups_are_those_of_top_k(seed: int, columns: int, k: int, values: int) -> None:
    """To the bit, with many ties, and where most of a row is forbidden (-inf)."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, values, (5, columns)).astype(np.float32)
    scores[1, rng.random(columns) < 0.99] = -np.inf
    scores[2] = scores[3] = -np.inf
    scores[3, -1] = 0
    expected = jax.lax.top_k(scores, min(k, columns))
    found = exact_top_k(jax.numpy.asarray(scores), min(k, columns))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(-100, 100), spread=st.integers(0, 30))
def test_two_halves_hold_a_query(seed: int, size: int, spread: int) -> None:
    """As exactly as the docstring says, whatever the query's size and however its values differ."""
    rng = np.random.default_rng(seed)
    exponents = size + rng.integers(-spread, 1, (3, 8))
    queries = np.ldexp(rng.uniform(-1, 1, (3, 8)), exponents).astype(np.float32)
    queries[2] = 0
    (high, low), exponent = split_queries(queries)
    held = np.ldexp(high.astype(np.float64) + low.astype(np.float64), exponent[:, None])
    largest = np.abs(queries).max(axis=1, keepdims=True).astype(np.float64)
    bound = np.maximum(2.0**-22 * np.abs(queries), 2.0**-38 * largest)
    assert (np.abs(held - queries) <= bound).all()
    assert (held[2] == 0).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_largest_magnitude_is_that_of_the_values(dtype: type) -> None:
    values = np.array([[1.5, -3.25], [0, 2]], dtype)
    for compute in (magnitude, device_magnitude):
        assert float(np.asarray(compute(values)).view(dtype)) == 3.25
        for broken in (np.nan, -np.nan, np.inf, -np.inf):
            wrong = values.copy()
            wrong[1, 0] = broken
            assert not np.isfinite(np.asarray(compute(wrong)).view(dtype))


@pytest.mark.parametrize(("halves", "factors"), [(True, ["f16 f16 f32"] * 2), (False, ["f32 f32 f32"])])
def test_what_a_float16_corpus_is_multiplied_in(halves: bool, factors: list[str]) -> None:
    """Factors and sums of every product of the compiled step: no float32 factor where halves are fast."""
    query = jnp.zeros((2, 16, 8), jnp.float16) if halves else jnp.zeros((1, 16, 8), jnp.float32)
    best = jnp.zeros((16, 3)), jnp.zeros((16, 3), jnp.int32)
    one = jnp.asarray(1, jnp.int32)
    lowered = merging(None, 3).lower(
        *best, query, jnp.zeros((64, 8), jnp.float16), one, one, None, None, None
    )
    kinds = r"dot_general.*tensor<[\dx]+x(\w+)>, tensor<[\dx]+x(\w+)>\) -> tensor<[\dx]+x(\w+)>"
    assert [" ".join(found) for found in re.findall(kinds, lowered.as_text())] == factors

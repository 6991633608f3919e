"""The test that a move has to pass: against SciPy, as a property, and how often worthless moves pass."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from prime_jax.hybrid.decide import rows_of, student_t, upper_bound

LOSSES = st.lists(st.floats(0, 100), min_size=8, max_size=8)


@pytest.mark.parametrize("freedom", [3, 7, 15, 31])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_the_quantile_is_that_of_student_to_two_percent(level: float, freedom: int) -> None:
    assert student_t(level, freedom) == pytest.approx(stats.t.ppf(level, freedom), rel=0.02)


def test_the_bound_is_that_of_a_paired_test() -> None:
    random = np.random.default_rng(0)
    old = random.normal(2, 0.5, 8)
    new = old - 0.1 + random.normal(0, 0.1, 8)
    told = stats.ttest_rel(new, old, alternative="less").confidence_interval(0.95)
    assert upper_bound(list(new), list(old), 0.95) == pytest.approx(told.high, abs=1e-4)


@given(LOSSES, LOSSES)
def test_what_passes_is_better_on_average(new: list[float], old: list[float]) -> None:
    """INV-4 where it is decided: the bound is never below the mean difference."""
    difference = np.mean(np.array(new) - np.array(old))
    assert upper_bound(new, old, 0.95) >= difference - 1e-9
    assert upper_bound(old, old, 0.95) == 0  # no better is not better


@given(LOSSES, st.integers(0, 7), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_is_no_number_never_passes(losses: list[float], at: int, wrong: float) -> None:
    """INV-7 where it is decided."""
    broken = [wrong if place == at else loss for place, loss in enumerate(losses)]
    assert upper_bound(broken, losses, 0.95) == math.inf
    assert upper_bound(losses, broken, 0.95) == math.inf


def test_worthless_moves_pass_as_often_as_the_level_says() -> None:
    noise = np.random.default_rng(0).normal(size=(4000, 8))
    passed = np.mean([upper_bound(list(row), [0.0] * 8, 0.95) < 0 for row in noise])
    assert 0.04 < passed < 0.06


def test_rows_of_a_batch_are_its_longest_leading_axis() -> None:
    assert rows_of({"x": np.zeros((16, 3)), "table": np.zeros((2, 9)), "scale": 1.0}) == 16
    assert rows_of({"scale": 1.0}) == 1

import itertools

import numpy as np
import pytest
from scipy import stats

from prime_jax.errors import DataError
from prime_jax.evaluate.significance import compare, interval
from prime_jax.retrieval.groups import linked

RNG = np.random.default_rng(0)
THEIRS = RNG.random(60)
OURS = THEIRS + RNG.normal(0.08, 0.25, 60)


def test_by_hand():
    result = compare(np.array([1.0, 0.5, 0.0, 1.0]), np.array([0.5, 0.5, 0.5, 0.0]), seed=0)
    # Differences 0.5, 0, -0.5, 1: mean 0.25, sample deviation sqrt(1.25 / 3) = 0.6455.
    assert result.difference == 0.25
    assert result.relative == pytest.approx(0.25 / 0.375)
    assert result.effect_size == pytest.approx(0.25 / np.sqrt(1.25 / 3))
    assert (result.wins, result.losses, result.ties) == (2, 1, 1)


def test_the_p_value_is_the_share_of_sign_flips_as_extreme():
    difference = np.array([0.5, 0.1, -0.2, 1.0, 0.3])
    sums = [abs(np.dot(signs, difference)) for signs in itertools.product((-1, 1), repeat=5)]
    exact = np.mean(np.array(sums) >= difference.sum() - 1e-12)
    assert compare(difference, np.zeros(5), seed=1).p == pytest.approx(exact, abs=0.015)


def test_agrees_with_scipy():
    result = compare(OURS, THEIRS, seed=0)
    permuted = stats.permutation_test(
        (OURS, THEIRS),
        lambda x, y, axis: (x - y).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=9_999,
        rng=np.random.default_rng(5),
    )
    assert result.p == pytest.approx(permuted.pvalue, abs=0.012)
    normal = stats.norm.interval(0.95, result.difference, stats.sem(OURS - THEIRS))
    np.testing.assert_allclose((result.low, result.high), normal, atol=0.01)
    assert result.low < result.difference < result.high


def test_the_interval_of_a_mean_contains_it_and_shrinks_with_queries():
    low, high = interval(THEIRS, seed=0)
    assert low < THEIRS.mean() < high
    small = interval(np.tile(THEIRS, 4), seed=0)
    assert (small[1] - small[0]) / (high - low) == pytest.approx(1 / 2, abs=0.03)


def test_copies_of_a_query_are_no_further_evidence_when_grouped():
    copies, groups = 9, np.repeat(np.arange(60), 9)
    alone = compare(OURS, THEIRS, seed=0)
    pretended = compare(np.repeat(OURS, copies), np.repeat(THEIRS, copies), seed=0)
    honest = compare(np.repeat(OURS, copies), np.repeat(THEIRS, copies), seed=0, groups=groups)
    assert honest.difference == pytest.approx(alone.difference)
    assert (honest.low, honest.high) == pytest.approx((alone.low, alone.high))
    assert honest.p == pytest.approx(alone.p)
    assert pretended.high - pretended.low == pytest.approx((alone.high - alone.low) / 3, rel=0.05)


def test_grouped_intervals_weigh_groups_by_their_size():
    # One group of three and one of one: every resample is a mean of queries, never a mean of group means.
    values, groups = np.array([1.0, 1.0, 1.0, 0.0]), np.array(["a", "a", "a", "b"])
    assert interval(values, seed=0, groups=groups) == (0.0, 1.0)
    assert compare(values, np.zeros(4), seed=0, groups=groups).difference == 0.75


def test_no_difference_is_not_significant():
    result = compare(THEIRS, THEIRS.copy(), seed=0)
    assert (result.difference, result.low, result.high, result.p) == (0, 0, 0, 1)
    assert result.effect_size is None


def test_a_sure_difference_has_the_smallest_p_that_ten_thousand_draws_can_show():
    assert compare(THEIRS + 1, THEIRS, seed=0).p == 1 / 10_001
    assert compare(THEIRS, np.zeros(60), seed=0).relative is None


def test_the_seed_decides():
    assert compare(OURS, THEIRS, seed=3) == compare(OURS, THEIRS, seed=3)
    assert compare(OURS, THEIRS, seed=3).p != compare(OURS, THEIRS, seed=4).p


def test_linked_joins_queries_that_share_a_turn():
    turns = [("hello", "book a room"), ("weather?",), ("book a room", "for two"), ("for two",), ("weather!",)]
    assert linked(turns).tolist() == [0, 1, 0, 0, 2]
    assert linked([(), ("x",), ()]).tolist() == [0, 1, 2]


@pytest.mark.parametrize("groups", [np.array([1, 1]), np.array(["same", "same"])])
def test_one_group_proves_nothing(groups):
    with pytest.raises(DataError, match="at least two independent"):
        compare(np.ones(2), np.zeros(2), seed=0, groups=groups)


def test_nan_is_refused():
    with pytest.raises(DataError, match="query 1 has a NaN"):
        interval(np.array([0.0, np.nan]), seed=0)

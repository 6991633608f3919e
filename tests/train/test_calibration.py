"""Fitting a confidence: calibrated where the truth is known, careful where nothing is gained."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from prime_jax.evaluate.reliability import calibration_error
from prime_jax.models.confidence import Confidence, features
from prime_jax.retrieval.vectors import unit
from prime_jax.train import calibration
from prime_jax.train.calibration import QUERIES_PER_CENTRE, RIDGES, centres_of, fit

DIM, TURNS = 16, 3


def queries(count: int, seed: int, topics: int = 4) -> np.ndarray:
    """Queries about some topics."""
    rng = np.random.default_rng(seed)
    about = np.eye(DIM)[rng.integers(topics, size=count)]
    return unit(about + rng.normal(0, 0.1, (count, DIM))).astype(np.float32)


def split(count: int, seed: int) -> tuple[np.ndarray, ...]:
    """Context, mask, query and prediction of queries on whose prediction the query has more or less say."""
    rng = np.random.default_rng(seed)
    query = queries(count, seed)
    share = rng.uniform(0, 1, (count, 1))
    predicted = unit(share * query + (1 - share) * unit(rng.normal(size=(count, DIM)))).astype(np.float32)
    context = rng.normal(size=(count, TURNS, DIM)).astype(np.float32)
    return context, np.ones((count, TURNS), bool), query, predicted


def truth(query: np.ndarray, predicted: np.ndarray, seed: int) -> np.ndarray:
    """A right passage is found more often where the prediction stays near the query."""
    chance = 1 / (1 + np.exp(-6 * (np.sum(query * predicted, axis=1) - 0.7)))
    return np.random.default_rng(seed).random(len(query)) < chance


def fitted(count: int = 2000, gain: float = 0.1) -> Confidence:
    context, mask, query, predicted = split(count, 0)
    return fit(
        context,
        mask,
        query,
        predicted,
        hit=truth(query, predicted, 1),
        gain=gain + np.random.default_rng(2).normal(0, 0.3, count),
        query_centres=centres_of(queries(400, 3)),
        answer_centres=centres_of(predicted),
    )


def test_is_calibrated_on_queries_that_it_has_not_seen() -> None:
    context, mask, query, predicted = split(2000, 10)
    said = fitted().probability(context, mask, query, predicted)
    right = truth(query, predicted, 11)
    assert calibration_error(said, right) < 0.05
    assert said[right].mean() > said[~right].mean() + 0.2


@pytest.mark.parametrize("ridge", RIDGES)
def test_the_weights_are_those_of_ridge_logistic_regression(ridge: float, monkeypatch) -> None:
    monkeypatch.setattr(calibration, "RIDGES", (ridge,))
    found = fitted()
    context, mask, query, predicted = split(2000, 0)
    values = features(context, mask, query, predicted, found.query_centres, found.answer_centres, TURNS)
    peer = LogisticRegression(C=1 / ridge, tol=1e-8, max_iter=1000)
    peer.fit((values - found.mean) / found.scale, truth(query, predicted, 1))
    np.testing.assert_allclose(found.weights, peer.coef_[0], atol=2e-3)
    np.testing.assert_allclose(found.bias, peer.intercept_, atol=2e-3)


def test_features_that_tell_nothing_are_held_down_and_those_that_tell_much_are_not() -> None:
    """On 150 queries: chance looks like a pattern there, and misleads elsewhere."""
    context, mask, query, predicted = split(150, 0)
    centres = {"query_centres": centres_of(queries(400, 3)), "answer_centres": centres_of(predicted)}
    told = {}
    for name, hit in (
        ("chance", np.random.default_rng(5).random(150) < 0.4),
        ("truth", truth(query, predicted, 1)),
    ):
        found = fit(context, mask, query, predicted, hit=hit, gain=np.zeros(150), **centres)
        told[name] = found.probability(*split(2000, 10))
    assert told["chance"].std() < 0.05
    assert told["truth"].std() > 0.15


def test_foreign_queries_are_not_trusted_and_typical_ones_are() -> None:
    found = fitted()
    assert found.trust(queries(500, 20)).mean() > 0.8
    foreign = unit(np.random.default_rng(0).normal(size=(500, DIM)) * (np.arange(DIM) >= 4))
    assert not found.trust(foreign.astype(np.float32)).any()


@pytest.mark.parametrize("gain", [0.0, -0.1])
def test_predictions_that_do_not_beat_the_query_are_not_trusted_at_all(gain: float) -> None:
    assert not fitted(gain=gain).trust(queries(50, 30)).any()


@pytest.mark.parametrize("always", [True, False])
def test_nothing_is_certain_after_a_few_queries(always: bool) -> None:
    context, mask, query, predicted = split(10, 0)
    centres = centres_of(query)
    found = fit(
        context,
        mask,
        query,
        predicted,
        hit=np.full(10, always),
        gain=np.zeros(10),
        query_centres=centres,
        answer_centres=centres,
    )
    said = found.probability(context, mask, query, predicted)
    assert (said > 0.5).all() if always else (said < 0.5).all()
    assert ((said > 0.001) & (said < 0.999)).all()
    assert not found.trust(query).any()


def test_a_single_query_can_be_fitted() -> None:
    context, mask, query, predicted = split(1, 0)
    centres = centres_of(query)
    parts = {"query_centres": centres, "answer_centres": centres}
    found = fit(context, mask, query, predicted, hit=np.array([True]), gain=np.array([1.0]), **parts)
    assert np.isfinite(found.probability(context, mask, query, predicted)).all()


def test_a_gain_of_one_long_conversation_is_no_proof() -> None:
    context, mask, query, predicted = split(200, 0)
    centres = centres_of(query)
    gain = np.where(np.arange(200) < 100, 0.5, 0.0) + np.random.default_rng(0).normal(0, 0.02, 200)
    parts = {"hit": gain > 0, "query_centres": centres, "answer_centres": centres}
    one_talk = np.where(np.arange(200) < 100, -1, np.arange(200))
    for groups, proven in ((None, 1.0), (one_talk, 0.0), (np.zeros(200, int), 1.0)):
        assert fit(context, mask, query, predicted, gain=gain, groups=groups, **parts).strength[0] == proven


def test_queries_that_repeat_are_trusted() -> None:
    """Where all dev queries are equally typical, none of them is foreign."""
    few = np.eye(DIM, dtype=np.float32)[:5]
    query = np.repeat(few, 40, axis=0)
    context, mask, _, predicted = split(200, 0)
    centres = centres_of(query)
    assert len(centres) == 1  # five different texts tell nothing but their mean
    gain = np.random.default_rng(0).normal(0.3, 0.1, 200)
    parts = {"hit": gain > 0, "query_centres": centres, "answer_centres": centres}
    found = fit(context, mask, query, predicted, gain=gain, **parts)
    np.testing.assert_allclose(found.trust(few), 1, atol=1e-3)


def test_every_centre_is_the_mean_of_many() -> None:
    """No single query can be read from the file."""
    lonely = np.concatenate([queries(200, 0), np.eye(DIM, dtype=np.float32)[-1:]])
    centres = centres_of(lonely)
    assert len(centres) <= len(lonely) // QUERIES_PER_CENTRE
    assert (centres[:, -1] < 0.9).all()
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 1, rtol=1e-5)
    assert centres_of(lonely[:3]).shape == (1, DIM)
    np.testing.assert_array_equal(centres, centres_of(lonely))

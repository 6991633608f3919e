"""The membership-inference attack finds memory where there is some, and nothing where there is none."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from prime_jax.errors import DataError
from prime_jax.evaluate.membership import Closeness, auc, closeness, membership


def side(seed: int, *, conversations: int = 300, moved: float = 0.0, harder: float = 0.0) -> Closeness:
    """Three examples per conversation; `moved` is what memory adds, `harder` lowers both closenesses."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(conversations), 3)
    query = rng.normal(0.5 - harder, 0.1, len(labels)).astype(np.float32)
    prediction = query + rng.normal(0.1 + moved, 0.05, len(labels)).astype(np.float32)
    return Closeness(prediction.astype(np.float32), query, labels)


def test_without_memory_nothing_is_found() -> None:
    found = membership(side(0), side(1))
    assert (found["members"], found["others"]) == (300, 300)
    for attack in found["attacks"].values():
        low, high = attack["auc_interval"]
        assert low < 0.5 < high
        assert attack["found_at_1_percent"] < 0.05


def test_memory_is_found() -> None:
    attacks = membership(side(0, moved=0.2), side(1))["attacks"]
    assert attacks["prediction"]["auc"] > 0.8
    assert attacks["calibrated"]["auc"] > 0.99
    assert attacks["calibrated"]["found_at_1_percent"] > 0.8
    assert attacks["query"]["auc_interval"][0] < 0.5 < attacks["query"]["auc_interval"][1]


def test_harder_conversations_are_not_taken_for_strangers() -> None:
    """The prediction alone would call easy conversations members; less the query's closeness it does not."""
    attacks = membership(side(0), side(1, harder=0.1))["attacks"]
    assert attacks["prediction"]["auc"] > 0.8
    assert attacks["query"]["auc"] > 0.8
    low, high = attacks["calibrated"]["auc_interval"]
    assert low < 0.5 < high


def test_auc_is_sklearns() -> None:
    rng = np.random.default_rng(0)
    inside, outside = rng.integers(0, 9, 70) / 3, rng.integers(0, 7, 50) / 3  # with many ties
    truth = np.concatenate([np.ones(70), np.zeros(50)])
    assert auc(inside, outside) == pytest.approx(roc_auc_score(truth, np.concatenate([inside, outside])))


def test_closeness_is_that_of_the_nearest_right_answer() -> None:
    corpus = np.array([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]], np.float32)
    vectors = np.array([[5.0, 0.0], [1.0, 0.0]], np.float32)
    found = closeness(vectors, corpus, [np.array([1, 0]), np.array([2])])
    np.testing.assert_allclose(found, [1.0, np.sqrt(0.5)], rtol=1e-6)


def test_without_a_comparable_query_the_plain_attack_remains() -> None:
    bare = [one._replace(query=None) for one in (side(0), side(1))]
    assert list(membership(*bare)["attacks"]) == ["prediction"]


def test_one_false_alarm_in_a_hundred_needs_a_hundred() -> None:
    found = membership(side(0), side(1, conversations=99))
    assert found["attacks"]["prediction"]["found_at_1_percent"] is None


def test_too_few_conversations_are_refused() -> None:
    with pytest.raises(DataError, match="9 and 300 conversations; at least ten are needed"):
        membership(side(0, conversations=9), side(1))

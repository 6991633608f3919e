"""Ridge regression against scikit-learn, and that no prediction has seen its own label."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from prime_jax.data import cluster_prediction
from prime_jax.data.cluster_prediction import cross_fit, folds_of, predict
from prime_jax.errors import DataError
from prime_jax.retrieval.vectors import unit

CLUSTERS = 4
Labelled = tuple[np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture
def labelled() -> Labelled:
    """Questions, clusters that they tell with some noise, groups of one to three."""
    random = np.random.default_rng(0)
    questions = unit(random.normal(size=(120, 6)).astype(np.float32))
    labels = np.argmax(questions[:, :CLUSTERS] + 0.2 * random.normal(size=(120, CLUSTERS)), axis=1)
    return questions, labels.astype(np.int32), np.unique(random.integers(0, 70, 120), return_inverse=True)[1]


def test_equals_scikit_learn(labelled: Labelled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_prediction, "ROWS", 32)
    questions, labels, groups = labelled
    folds = folds_of(groups, seed=0)
    fitted = cross_fit(questions, labels, folds, CLUSTERS, (0.5,))
    hot = np.eye(CLUSTERS)[labels]

    def ridge(rows: np.ndarray) -> Ridge:
        # 0.5 of the mean eigenvalue: unit vectors have the trace n
        return Ridge(0.5 * (questions[rows].astype(float) ** 2).sum() / 6).fit(questions[rows], hot[rows])

    for fold in range(5):
        expected = ridge(folds != fold).predict(questions[folds == fold]).argmax(axis=1)
        np.testing.assert_array_equal(fitted.predicted[folds == fold], expected)
    whole = ridge(np.ones(120, bool))
    np.testing.assert_allclose(fitted.weights[:-1].T, whole.coef_, atol=1e-5)
    np.testing.assert_allclose(fitted.weights[-1], whole.intercept_, atol=1e-5)
    np.testing.assert_array_equal(predict(fitted.weights, questions), whole.predict(questions).argmax(axis=1))
    assert fitted.accuracy == np.mean(fitted.predicted == labels) > 0.6


def test_labels_of_a_group_change_nothing_that_is_predicted_for_it(labelled: Labelled) -> None:
    questions, labels, groups = labelled
    folds = folds_of(groups, seed=0)
    before = cross_fit(questions, labels, folds, CLUSTERS, (0.03,)).predicted
    others = 0
    for group in range(0, groups.max(), 7):
        changed = np.where(groups == group, (labels + 1) % CLUSTERS, labels).astype(np.int32)
        after = cross_fit(questions, changed, folds, CLUSTERS, (0.03,)).predicted
        np.testing.assert_array_equal(after[groups == group], before[groups == group])
        np.testing.assert_array_equal(
            after[folds == folds[groups == group][0]], before[folds == folds[groups == group][0]]
        )
        others += int((after != before).sum())
    assert others > 0  # the labels do matter, to the others


def test_folds_keep_groups_and_are_even(labelled: Labelled) -> None:
    groups = labelled[2]
    folds = folds_of(groups, seed=0)
    for group in range(groups.max() + 1):
        assert len(set(folds[groups == group].tolist())) == 1
    sizes = np.bincount(folds)
    assert len(sizes) == 5
    assert sizes.max() - sizes.min() <= np.bincount(groups).max()
    np.testing.assert_array_equal(folds, folds_of(groups, seed=0))
    assert (folds != folds_of(groups, seed=1)).any()
    assert np.bincount(folds_of(np.array([0, 0, 1, 2]), seed=0)).tolist() == [2, 1, 1]


def test_two_groups_are_too_few() -> None:
    with pytest.raises(DataError, match="has 2 groups of examples without a common question or turn"):
        folds_of(np.arange(9) % 2, seed=0)


def test_strengths_are_chosen_by_what_was_left_out(labelled: Labelled) -> None:
    """The choice for a fold looks at the other folds only, the choice for other splits at all of them."""
    questions, labels, groups = labelled
    folds = folds_of(groups, seed=0)
    choices = (3.0, 0.3, 0.01)

    def right(some: np.ndarray, strength: float) -> tuple[np.ndarray, int]:
        numbered = np.unique(folds[some], return_inverse=True)[1]
        found = cross_fit(questions[some], labels[some], numbered, CLUSTERS, (strength,)).predicted
        return found, int((found == labels[some]).sum())

    whole = np.ones(len(labels), bool)
    alone = [right(whole, strength) for strength in choices]
    assert len({hits for _, hits in alone}) > 1
    fitted = cross_fit(questions, labels, folds, CLUSTERS, choices)
    assert fitted.strength == choices[int(np.argmax([hits for _, hits in alone]))]
    for fold in range(5):
        best = int(np.argmax([right(folds != fold, strength)[1] for strength in choices]))
        np.testing.assert_array_equal(fitted.predicted[folds == fold], alone[best][0][folds == fold])
    assert fitted.accuracy == np.mean(fitted.predicted == labels)


def test_labels_do_not_reach_their_own_rows_through_the_strength(labelled: Labelled) -> None:
    questions, labels, groups = labelled
    folds = folds_of(groups, seed=0)
    before = cross_fit(questions, labels, folds, CLUSTERS).predicted
    for fold in range(5):  # all labels of a fold at once
        changed = np.where(folds == fold, (labels + 1) % CLUSTERS, labels).astype(np.int32)
        after = cross_fit(questions, changed, folds, CLUSTERS).predicted
        np.testing.assert_array_equal(after[folds == fold], before[folds == fold])

import ir_measures
import numpy as np
import pytest

from prime_jax.errors import DataError
from prime_jax.retrieval.metrics import first_rank, is_positive, ranking_metrics


def ranking(*first: int) -> list[int]:
    """Ten places that begin with the given rows and go on with wrong ones."""
    return [*first, *range(100, 110 - len(first))]


def test_by_hand():
    # Query 0: right rows 1 and 2 at ranks 1 and 3. Query 1: its right row is not found.
    # Query 2: one of four right rows, at rank 7.
    indices = np.array([ranking(1, 50, 2), ranking(), [*ranking()[:6], 5, 60, 61, 62]])
    positives = [np.array([1, 2]), np.array([3]), np.array([5, 6, 7, 8])]
    metrics = ranking_metrics(indices, positives)
    gain = 1 / np.log2(np.arange(2, 12))  # discount of ranks 1..10
    expected = {
        "P@1": [1, 0, 0],
        "P@5": [2 / 5, 0, 0],
        "R@5": [1, 0, 0],
        "R@10": [1, 0, 1 / 4],
        "MRR@10": [1, 0, 1 / 7],
        "nDCG@10": [(gain[0] + gain[2]) / gain[:2].sum(), 0, gain[6] / gain[:4].sum()],
    }
    assert list(metrics) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(metrics[name], values, atol=1e-12, err_msg=name)


def test_equals_ir_measures_on_a_run_in_score_order():
    rng = np.random.default_rng(0)
    indices = np.stack([rng.permutation(40)[:12] for _ in range(30)])
    positives = [rng.choice(40, rng.integers(1, 6), replace=False) for _ in range(30)]
    metrics = ranking_metrics(indices, positives)
    run = [
        ir_measures.ScoredDoc(f"q{q}", f"d{row}", 1 / (rank + 1))
        for q, rows in enumerate(indices)
        for rank, row in enumerate(rows)
    ]
    qrels = [ir_measures.Qrel(f"q{q}", f"d{row}", 1) for q, rows in enumerate(positives) for row in rows]
    measures = [ir_measures.parse_measure(name) for name in ("P@1", "P@5", "R@5", "R@10", "RR@10", "nDCG@10")]
    expected = ir_measures.calc_aggregate(measures, qrels, run)
    for name, measure in zip(metrics, measures, strict=True):
        assert metrics[name].mean() == pytest.approx(expected[measure], abs=1e-12), name


def test_our_order_wins_over_document_names():
    # Reading the rows as names, trec_eval would put "9" before "10" among equal scores.
    for right, reciprocal in ((10, 1.0), (9, 1 / 2)):
        metrics = ranking_metrics(np.array([ranking(10, 9)]), [np.array([right])])
        assert metrics["MRR@10"][0] == reciprocal


def test_empty_places_count_as_wrong():
    indices = np.array([[4, 1] + [-1] * 8, [-1] * 10])
    metrics = ranking_metrics(indices, [np.array([1]), np.array([1])])
    assert metrics["MRR@10"].tolist() == [0.5, 0]
    assert metrics["P@5"].tolist() == [0.2, 0]


def test_rank_eleven_is_not_counted():
    indices = np.array([[*ranking(), 7]])
    assert all(values[0] == 0 for values in ranking_metrics(indices, [np.array([7])]).values())


@pytest.mark.parametrize(
    ("indices", "positives", "message"),
    [
        ([ranking()], [], "1 rankings for 0 lists"),
        ([ranking()[:9]], [np.array([1])], "rankings of 9 rows, the metrics need 10"),
        ([ranking()], [np.array([], np.int64)], "query 0 has no positive"),
        ([ranking(3, 3)], [np.array([1])], "query 0 returns a row twice"),
        ([ranking(1, -1, 2)], [np.array([1])], "query 0 has an empty place before a filled one"),
    ],
)
def test_bad_input_is_a_clear_error(indices, positives, message):
    with pytest.raises(DataError, match=message):
        ranking_metrics(np.array(indices), positives)


def test_first_rank_with_a_leading_axis():
    indices = np.array([[[5, 6, 7], [1, 2, -1]], [[7, 5, 6], [-1, -1, -1]]])
    positives = [np.array([6, 7]), np.array([2])]
    assert first_rank(indices, positives).tolist() == [[2, 2], [1, 0]]
    assert is_positive(indices, positives)[0].tolist() == [[False, True, True], [False, True, False]]

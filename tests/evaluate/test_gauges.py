"""Seen and unseen apart, hubs, and collapse, on rankings that one can count by hand."""

import numpy as np
import pytest

from prime_jax.evaluate.evaluation import Evaluation
from prime_jax.evaluate.gauges import APART, FEWEST, gauges, hubness, novelty
from prime_jax.evaluate.report import report_values
from prime_jax.evaluate.significance import compare
from prime_jax.evaluate.words import gauge_words, novelty_table, novelty_words
from prime_jax.retrieval.novelty import unseen


def rows(*lists: list[int]) -> list[np.ndarray]:
    return [np.array(one, np.int64) for one in lists]


def made(count: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.random(count) for name in APART}


def test_unseen_has_no_right_answer_that_was_one_in_training() -> None:
    found = unseen(rows([1, 2], [3], [4, 5], []), rows([3, 9], [5]))
    assert found.tolist() == [True, False, False, True]
    assert unseen(rows([1]), []).tolist() == [True]


def test_means_and_significance_are_those_of_the_part() -> None:
    fresh, groups = np.arange(60) % 3 == 0, np.arange(60) // 2
    metrics = {"query": made(60, 0), "predicted": made(60, 1)}
    found = novelty(metrics, fresh, "predicted", seed=0, groups=groups)
    assert found is not None
    for name in metrics:
        for kind, part in (("unseen", fresh), ("seen", ~fresh)):
            assert found.means[name][kind]["P@5"] == pytest.approx(metrics[name]["P@5"][part].mean())
    expected = compare(
        metrics["predicted"]["MRR@10"][fresh], metrics["query"]["MRR@10"][fresh], seed=0, groups=groups[fresh]
    )
    assert found.significance == {
        "query": {**found.significance["query"], "MRR@10": expected},
    }


def test_few_unseen_queries_are_shown_but_not_compared() -> None:
    fresh = np.arange(60) < FEWEST - 1
    found = novelty({"query": made(60, 0), "predicted": made(60, 1)}, fresh, "predicted", seed=0, groups=None)
    assert found is not None
    assert found.significance == {}
    assert set(found.means) == {"query", "predicted"}


@pytest.mark.parametrize("fresh", [np.ones(4, bool), np.zeros(4, bool)])
def test_one_kind_alone_needs_no_table(fresh: np.ndarray) -> None:
    assert novelty({"predicted": made(4, 0)}, fresh, "predicted", seed=0, groups=None) is None


def test_hubness() -> None:
    """Everything returned equally often is even; one passage for everybody is a hub."""
    assert hubness(np.arange(1000).reshape(100, 10), 1000) == 0.0
    hub = np.column_stack([np.zeros(100, np.int64), 1 + np.arange(900).reshape(100, 9)])
    assert hubness(hub, 1000) > 20
    assert hubness(np.full((3, 10), -1), 5) == 0.0


def test_gauges_name_what_they_are_of() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(50, 8)).astype(np.float32)
    collapsed = np.ones((50, 8), np.float32) + 1e-4 * vectors[:, :1]
    found = gauges({"predicted": np.arange(500).reshape(50, 10)}, collapsed, vectors, vectors, 500)
    assert found["effective_rank"]["predicted"] < 1.1
    assert found["effective_rank"]["query"] == found["effective_rank"]["right answers"] > 6


def test_the_report_says_it_in_words(evaluation: Evaluation) -> None:
    values = report_values(evaluation, {})
    assert "Hubness" in gauge_words(values)
    assert (novelty_table(values) is None) == (evaluation.novelty is None)
    values["novelty"] = {
        "unseen": 7,
        "seen": 17,
        "methods": {
            name: {kind: dict.fromkeys(APART, 0.5) for kind in ("unseen", "seen")}
            for name in values["methods"]
        },
        "significance": {"query": {"MRR@10": {"difference": 0.1, "low": 0.05, "high": 0.15, "p": 0.0001}}},
    }
    head, lines = novelty_table(values)
    assert head[:2] == ["method", "unseen P@5"]
    assert lines[-1][0] == "predicted"
    assert "the 7 questions" in novelty_words(values)
    assert "+0.100 MRR@10 (95% interval +0.050 to +0.150, p < 0.001)" in novelty_words(values)

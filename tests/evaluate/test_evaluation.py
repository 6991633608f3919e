import dataclasses

import numpy as np
import pytest

from prime_jax.errors import DataError
from prime_jax.evaluate.arrays import Corpus, Split
from prime_jax.evaluate.evaluation import COMPARED, Evaluation, evaluate_methods
from prime_jax.evaluate.significance import compare
from prime_jax.evaluate.words import headline, p_words
from prime_jax.retrieval.metrics import mean_reciprocal_rank
from prime_jax.retrieval.vectors import unit


def test_methods_and_their_numbers(evaluation: Evaluation):
    assert list(evaluation.methods) == [
        "query", "mean_context", "recency_mix", "average_prf", "rocchio", "ridge", "ridge_context",
        "predicted",
    ]  # fmt: skip
    groups = np.arange(24) // 2
    ours = evaluation.methods["predicted"].metrics
    for name, method in evaluation.methods.items():
        mrr = mean_reciprocal_rank(method.indices[None, :, :10], evaluation.test.positives)[0]
        assert method.mean("MRR@10") == pytest.approx(float(mrr), abs=1e-12)
        for metric in COMPARED:
            low, high = method.intervals[metric]
            assert low <= method.mean(metric) + 1e-12
            assert high >= method.mean(metric) - 1e-12
            if name != "predicted":
                expected = compare(ours[metric], method.metrics[metric], seed=0, groups=groups)
                assert evaluation.significance[name][metric] == expected
    assert evaluation.groups == 12


def test_the_plain_query_ranks_by_inner_product(evaluation: Evaluation, passages: np.ndarray):
    method = evaluation.methods["query"]
    query = unit(evaluation.test.query)
    for row in range(24):
        np.testing.assert_allclose(passages[method.indices[row]] @ query[row], method.scores[row], atol=1e-6)
        np.testing.assert_allclose(np.sort(passages @ query[row])[::-1][:100], method.scores[row], atol=1e-6)


def test_tuned_baselines_are_at_least_the_plain_query_on_dev(evaluation: Evaluation):
    plain = evaluation.methods["query"].dev_mrr
    for name in ("mean_context", "recency_mix", "average_prf", "rocchio"):  # their grids hold the plain query
        assert evaluation.methods[name].dev_mrr >= plain
    assert evaluation.methods["recency_mix"].tried == 61


def test_the_best_baseline_is_the_strongest_opponent(evaluation: Evaluation):
    mrr = {name: method.mean("MRR@10") for name, method in evaluation.methods.items() if name != "predicted"}
    assert mrr[evaluation.best_baseline] == max(mrr.values())


def test_the_headline_says_what_was_found(evaluation: Evaluation):
    first = evaluation.methods["predicted"].mean("P@1"), evaluation.methods["query"].mean("P@1")
    text = headline(evaluation)
    assert f"{first[0] / first[1]:.1f} times as often as searching with the query" in text
    assert f"({first[0]:.1%} against {first[1]:.1%} of 24 questions)" in text
    assert f"It is better than the best tuned baseline, {evaluation.best_baseline}" in text


def with_comparison(evaluation: Evaluation, **values: float) -> Evaluation:
    best = evaluation.best_baseline
    changed = evaluation.significance[best]["MRR@10"]._replace(**values)
    return dataclasses.replace(evaluation, significance={best: {"MRR@10": changed}})


def test_the_headline_is_honest_about_the_rest(evaluation: Evaluation):
    assert "is not certain" in headline(with_comparison(evaluation, p=0.2))
    assert "It is worse than the best" in headline(with_comparison(evaluation, p=0.001, difference=-0.1))
    methods = dict(evaluation.methods)
    never = {**methods["query"].metrics, "P@1": np.zeros(24)}
    methods["query"] = dataclasses.replace(methods["query"], metrics=never)
    assert "a query that never puts one first" in headline(dataclasses.replace(evaluation, methods=methods))
    assert (p_words(0.0004), p_words(0.25)) == ("p < 0.001", "p = 0.250")


def test_predictions_of_another_shape_are_refused():
    vectors = np.ones((3, 2), np.float32)
    split = Split(vectors, vectors[:, None], np.ones((3, 1), bool), [np.array([0])] * 3)
    for shape in ((2, 2), (3, 4)):
        with pytest.raises(DataError, match=r"for 3 queries and passages of 2 dimensions"):
            evaluate_methods("test", split, np.ones(shape, np.float32), train=split, dev=split,
                             corpus=Corpus(vectors), seed=0)  # fmt: skip

"""Reliability by hand, and of a confidence that is perfect."""

import json
from dataclasses import replace

import numpy as np
import pytest

from prime_jax.evaluate.evaluation import COMPARED, Evaluation
from prime_jax.evaluate.page import page
from prime_jax.evaluate.plots import JUDGED, figures
from prime_jax.evaluate.reliability import COVERAGE, calibration_error, reliability
from prime_jax.evaluate.report import report_values
from prime_jax.evaluate.words import confidence_words, markdown


def metrics(hits: np.ndarray) -> dict[str, np.ndarray]:
    return {"P@5": 0.2 * hits, "MRR@10": 1.0 * hits}


def test_the_calibration_error_by_hand() -> None:
    """Fifty queries said 0.2 of which 20 are right, fifty said 0.9 of which 40 are: errors 0.2 and 0.1."""
    said = np.repeat([0.2, 0.9], 50).astype(np.float32)
    right = np.concatenate([np.arange(50) < 20, np.arange(50) < 40])
    assert calibration_error(said, right) == pytest.approx(0.15)
    found = reliability(said, metrics(right), metrics(0 * right), ("P@5",), seed=0)
    np.testing.assert_allclose(found.said, [0.2, 0.9], rtol=1e-6)
    np.testing.assert_allclose(found.found, [0.4, 0.8])
    assert found.counts.tolist() == [50, 50]
    assert found.brier == pytest.approx((30 * 0.04 + 20 * 0.64 + 40 * 0.01 + 10 * 0.81) / 100)
    assert found.auc == pytest.approx((40 * 30 + (20 * 30 + 40 * 10) / 2) / (60 * 40))


def test_a_perfect_confidence_shows_the_error_of_chance_alone() -> None:
    rng = np.random.default_rng(0)
    said = rng.random(2000).astype(np.float32)
    right = rng.random(2000) < said
    found = reliability(said, metrics(right), metrics(0 * right), ("P@5",), seed=0)
    assert found.ece < 0.05
    assert 0.5 * found.ece < found.ece_by_chance < 2 * found.ece
    assert len(found.said) == 10


def test_the_selective_curve_goes_from_the_query_to_the_predictions() -> None:
    said = np.linspace(0, 1, 40).astype(np.float32)
    right = said > 0.5
    found = reliability(said, metrics(right), metrics(~right), ("P@5", "MRR@10"), seed=0)
    curve = found.selective["MRR@10"]
    assert (curve[0], curve[-1]) == (0.5, 0.5)  # the query is right where the prediction is not
    assert curve.max() == curve[len(COVERAGE) // 2] == 1.0
    alone = found.confident["MRR@10"]
    assert np.isnan(alone[0])
    np.testing.assert_allclose(alone[1:11], 1.0)
    assert alone[-1] == 0.5


@pytest.mark.parametrize("right", [True, False])
def test_without_both_kinds_there_is_no_auc(right: bool) -> None:
    hits = np.full(5, right)
    found = reliability(np.full(5, 0.5, np.float32), metrics(hits), metrics(hits), ("P@5",), seed=0)
    assert found.auc is None
    assert found.ece == pytest.approx(0.5)


def test_a_handful_of_questions_can_be_reported(evaluation: Evaluation) -> None:
    for count in (1, 2, 8):
        predicted, query = (
            {name: values[:count] for name, values in evaluation.methods[method].metrics.items()}
            for method in ("predicted", "query")
        )
        said = np.full(count, 0.5, np.float32)
        found = replace(evaluation, reliability=reliability(said, predicted, query, COMPARED, seed=0))
        values = report_values(found, {})
        json.dumps(values, allow_nan=False)
        assert confidence_words(values)


@pytest.fixture(scope="module")
def told(evaluation: Evaluation) -> Evaluation:
    """The evaluation of a model that is calibrated, guarded and ablated."""
    said = np.linspace(0.1, 0.9, len(evaluation.test.query)).astype(np.float32)
    predicted, query = (evaluation.methods[name].metrics for name in ("predicted", "query"))
    means = dict.fromkeys(COMPARED, 0.321)
    return replace(
        evaluation,
        reliability=reliability(said, predicted, query, COMPARED, seed=0),
        guard={**means, "trust": 0.75, "fallback": "the query"},
        ablation={"no context": means},
    )


def test_the_report_says_and_draws_it(told: Evaluation) -> None:
    values = report_values(told, {})
    assert told.reliability is not None
    assert values["confidence"]["ece"] == told.reliability.ece
    assert values["confidence"]["confident"]["P@5"][0] is None
    json.dumps(values, allow_nan=False)
    words = " ".join(confidence_words(values))
    assert f"error {told.reliability.ece:.3f}" in words
    assert "lets 75% of a prediction through" in words
    pictures = figures(told)
    html = page(values, [], pictures, "")
    assert html.count("<svg") == 4
    for caption in JUDGED:
        assert html.index("<h2>Confidence</h2>") < html.index(caption)
    for text in (html, markdown(values, [], "")):
        assert "everything (plain query)" in text
        assert "0.321" in text


def test_a_report_without_confidence_leaves_it_out(evaluation: Evaluation) -> None:
    values = report_values(evaluation, {})
    assert values["confidence"] is None
    html = page(values, [], figures(evaluation), "")
    assert "Confidence" not in html
    assert "What each part is worth" not in html

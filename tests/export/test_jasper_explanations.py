"""The same explanation from JAX, from ONNX Runtime and from PyTorch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from steered_models import D, K, make, requests, unit_vectors

from prime_jax.errors import PredictorError
from prime_jax.explain.explainer import Explainer
from prime_jax.explain.known import KnownPairs
from prime_jax.export.bundle import write_bundle
from prime_jax.export.golden import onnxruntime_answers, torch_answers
from prime_jax.types import Prediction

ROWS = 20
NAMES = [f"subspace {number}" for number in range(K)]


def test_explanations_are_the_same_everywhere(tmp_path: Path) -> None:
    model, folder = make("subspace"), tmp_path / "bundle"
    write_bundle(model, folder, facts={"encoder": "test", "subspaces": NAMES})
    rng = np.random.default_rng(3)
    known = KnownPairs(
        unit_vectors(rng, 30), unit_vectors(rng, 30), list("q" * 30), list("s" * 30), list("i" * 30)
    )
    centroids = np.asarray(model.centroids[...])

    def answered(by: Callable[..., dict[str, Any]]) -> Explainer:
        def answers(questions: np.ndarray, steering: np.ndarray) -> Prediction:
            given = {
                "context": steering[:, None],
                "context_mask": np.any(steering[:, None] != 0, axis=-1),
                "query": questions,
            }
            found = by(given, folder)
            return Prediction(**{name: found[name] for name in ("embedding", "routing", "coarse", "fine")})

        return Explainer(model, centroids, NAMES, known=known, answers=answers)

    context, question, mask = requests(ROWS)
    steering = np.where(mask, context[:, 0], 0.0).astype(np.float32)
    expected = Explainer(model, centroids, NAMES, known=known).explain_batch(question, steering)
    assert len({found.primary_subspace for found in expected}) > 1
    for runtime in (onnxruntime_answers, torch_answers):
        for ours, theirs in zip(expected, answered(runtime).explain_batch(question, steering), strict=True):
            mine, other = ours.to_json(), theirs.to_json()
            assert mine["primary_subspace"] == other["primary_subspace"]
            assert mine["actionable_signal"] == other["actionable_signal"]
            assert list(mine["routing_distribution"]) == list(other["routing_distribution"])
            for name in ("predicted_source_emb", "routing", "coarse_vector", "fine_vector", "atypicality"):
                np.testing.assert_allclose(other[name], mine[name], atol=1e-5)
            assert other["steering_influence"]["kl"] == pytest.approx(
                mine["steering_influence"]["kl"], abs=1e-4
            )
            pairs = ([pair["similarity"] for pair in each["similar_known_pairs"]] for each in (mine, other))
            np.testing.assert_allclose(*pairs, atol=1e-5)


def test_a_bundle_names_its_subspaces(tmp_path: Path) -> None:
    write_bundle(make("subspace"), tmp_path / "bundle", facts={"subspaces": NAMES})
    assert json.loads((tmp_path / "bundle" / "config.json").read_text())["subspaces"] == NAMES


def test_a_plain_model_is_explained_by_its_nearest_cluster() -> None:
    model = make("jasper")
    centroids = unit_vectors(np.random.default_rng(0), K)
    _, question, _ = requests(2)
    (found, _) = Explainer(model, centroids, NAMES).explain_batch(question)
    assert (found.confidence, found.atypicality, found.routing_distribution) == (None, None, {})
    nearest = int(np.argmax(centroids @ found.predicted_source_emb))
    assert found.primary_subspace == NAMES[nearest]
    assert found.actionable_signal == f"The prediction lies nearest to “{NAMES[nearest]}”."
    for wrong in (question[:, : D - 1], np.full_like(question, np.nan)):
        with pytest.raises(PredictorError):
            Explainer(model, centroids, NAMES).explain_batch(wrong)

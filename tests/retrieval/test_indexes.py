"""Other ways to search give what the exact search gives, or nearly."""

from typing import Any

import numpy as np
import pytest

from prime_jax.errors import DataError
from prime_jax.retrieval import INDEXES
from prime_jax.retrieval import indexes as module
from prime_jax.retrieval.indexes import open_index
from prime_jax.retrieval.topk import search

RNG = np.random.default_rng(0)
PASSAGES, QUERIES, DIM, K = 500, 20, 16, 10


def units(rows: int) -> np.ndarray:
    vectors = RNG.normal(size=(rows, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


CORPUS, ASKED = units(PASSAGES), units(QUERIES)
EXCLUDE = [RNG.integers(0, PASSAGES, number % 4) for number in range(QUERIES)]
SCOPES = {"query_scope": RNG.integers(0, 3, QUERIES), "corpus_scope": RNG.integers(0, 3, PASSAGES)}


def found_with(kind: Any, **settings: Any) -> tuple[np.ndarray, np.ndarray]:
    corpus_scope = settings.pop("corpus_scope", None)
    with open_index(kind, CORPUS, corpus_scope) as index:
        return index.search(ASKED, K, **settings)


@pytest.mark.parametrize("kind", ["exact", "faiss", "qdrant"])
@pytest.mark.parametrize("settings", [{}, {"exclude": EXCLUDE}, SCOPES, {"exclude": EXCLUDE, **SCOPES}])
def test_what_compares_with_every_passage_is_exact(kind: str, settings: dict[str, Any]) -> None:
    scores, rows = found_with(kind, **settings)
    expected_scores, expected = search(ASKED, CORPUS, K, **settings)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"exclude": EXCLUDE}, SCOPES])
def test_a_graph_finds_nearly_all_and_nothing_that_is_forbidden(settings: dict[str, Any]) -> None:
    _, rows = found_with("hnsw", **settings)
    _, expected = search(ASKED, CORPUS, K, **settings)
    recall = np.mean([len(set(one) & set(other)) / K for one, other in zip(rows, expected, strict=True)])
    assert recall > 0.95
    for row in range(QUERIES):
        if "exclude" in settings:
            assert not np.isin(rows[row], EXCLUDE[row]).any()
        if "query_scope" in settings:
            assert (SCOPES["corpus_scope"][rows[row]] == SCOPES["query_scope"][row]).all()


def test_a_graph_compares_small_scopes_one_by_one() -> None:
    """Its walk would hardly meet the passages of a small scope."""
    many = {"query_scope": RNG.integers(0, 50, QUERIES), "corpus_scope": RNG.integers(0, 50, PASSAGES)}
    np.testing.assert_array_equal(found_with("hnsw", **many)[1], search(ASKED, CORPUS, K, **many)[1])


def test_large_scopes_are_filtered_in_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALL_SCOPE", 0)
    np.testing.assert_array_equal(found_with("faiss", **SCOPES)[1], search(ASKED, CORPUS, K, **SCOPES)[1])
    monkeypatch.setattr(module, "QUERIES", 3)  # and some queries at a time
    np.testing.assert_array_equal(
        found_with("hnsw", exclude=EXCLUDE)[1].shape, search(ASKED, CORPUS, K, exclude=EXCLUDE)[1].shape
    )


@pytest.mark.parametrize("kind", ["faiss", "hnsw", "qdrant"])
def test_a_small_scope_leaves_places_empty(kind: str) -> None:
    few = np.where(np.arange(PASSAGES) < 3, 1, 0)
    scores, rows = found_with(kind, query_scope=np.ones(QUERIES, np.int64), corpus_scope=few)
    assert (np.sort(rows[:, :3], axis=1) == [0, 1, 2]).all()
    assert (rows[:, 3:] == -1).all()
    assert (scores[:, 3:] == -np.inf).all()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(DataError, match=r'faiss is not installed: pip install "prime-jax\[search\]"'):
        found_with("faiss")


def test_a_server_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(module.URL, "http://127.0.0.1:9")
    with pytest.raises(DataError, match="Qdrant did not do what was asked"):
        found_with("qdrant")


def test_every_kind_is_offered() -> None:
    assert set(INDEXES) == {"exact", "faiss", "hnsw", "qdrant"}

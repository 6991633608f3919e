"""Spherical k-means: what it finds, and what it refuses."""

import sys

import numpy as np
import pytest

from prime_jax.data import clusters
from prime_jax.data.clusters import cluster_passages, nearest
from prime_jax.errors import DataError
from prime_jax.retrieval.vectors import unit


def three_groups(each: int = 20) -> np.ndarray:
    """Passages near the three axes, in turn."""
    random = np.random.default_rng(1)
    axes = np.tile(np.eye(3, 8, dtype=np.float32), (each, 1))
    return unit(axes + 0.1 * random.normal(size=axes.shape).astype(np.float32))


def test_groups_are_found_and_a_centroid_is_the_direction_of_the_sum() -> None:
    passages = three_groups()
    found = cluster_passages(passages, 3, seed=0)
    assert sorted(found.sizes().tolist()) == [20, 20, 20]
    for group in range(3):
        own = found.assignment[group::3]
        assert len(set(own.tolist())) == 1
        expected = passages[group::3].sum(axis=0)
        np.testing.assert_allclose(found.centroids[own[0]], expected / np.linalg.norm(expected), atol=1e-6)
        assert found.members(own[:1]).tolist() == list(range(group, 60, 3))
    assert found.centroids.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(found.assignment, np.argmax(passages @ found.centroids.T, axis=1))


def test_a_seed_gives_the_same_bytes_and_another_one_others() -> None:
    passages = unit(np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32))
    one, same, other = (cluster_passages(passages, 7, seed=seed) for seed in (3, 3, 4))
    assert one.centroids.tobytes() == same.centroids.tobytes()
    assert one.assignment.tobytes() == same.assignment.tobytes()
    assert one.centroids.tobytes() != other.centroids.tobytes()


def test_a_large_corpus_is_clustered_by_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "SAMPLE", 5)
    found = cluster_passages(three_groups(), 3, seed=0)
    assert sorted(found.sizes().tolist()) == [20, 20, 20]


def test_as_many_clusters_as_passages() -> None:
    found = cluster_passages(np.eye(5, dtype=np.float32), 5, seed=0)
    assert sorted(found.assignment.tolist()) == [0, 1, 2, 3, 4]


def test_more_clusters_than_passages_are_refused() -> None:
    with pytest.raises(DataError, match="5 passages, too few for 6 clusters; give a smaller --clusters"):
        cluster_passages(np.eye(5, dtype=np.float32), 6, seed=0)


def test_passages_that_are_alike_leave_a_cluster_empty() -> None:
    alike = np.tile(np.eye(2, 4, dtype=np.float32), (10, 1))
    with pytest.raises(DataError, match=r"cluster \d of 6 has no passage.*smaller --clusters"):
        cluster_passages(alike, 6, seed=0)


def test_without_faiss_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(DataError, match=r'pip install "prime-jax\[search\]"'):
        cluster_passages(np.eye(5, dtype=np.float32), 2, seed=0)


def test_equals_go_to_the_first_centroid() -> None:
    centroids = np.eye(3, dtype=np.float32)
    vectors = np.array([[0, 1, 1], [1, 1, 1], [0, 0, 2]], np.float32)
    assert nearest(vectors, centroids).tolist() == [1, 0, 2]

"""Clusters of passages: spherical k-means over their embeddings, with faiss (the extra `search`)."""

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Int32, Int64

from prime_jax.errors import DataError
from prime_jax.retrieval.topk import Rows
from prime_jax.retrieval.vectors import unit

ROUNDS = 25  # of k-means
SAMPLE = 1024  # passages for each cluster that k-means sees at most
ROWS = 8192  # passages that are compared with the centroids at a time


@dataclass(frozen=True, eq=False)
class Clusters:
    """A partition of the corpus.

    Attributes:
        centroids: Unit centroids, `[C, D]`.
        assignment: Cluster of each passage, the one with the nearest centroid, `[M]`.
    """

    centroids: Float32[np.ndarray, "C D"]
    assignment: Int32[np.ndarray, " M"]

    def members(self, clusters: Int[np.ndarray, " n"]) -> Int64[np.ndarray, " _"]:
        """Corpus rows of the passages of these clusters, ascending."""
        return np.flatnonzero(np.isin(self.assignment, clusters))

    def sizes(self) -> Int64[np.ndarray, " C"]:
        """Passages of each cluster, `[C]`."""
        return np.bincount(self.assignment, minlength=len(self.centroids))


def cluster_passages(passages: Rows, count: int, *, seed: int) -> Clusters:
    """Spherical k-means (Dhillon & Modha 2001), the same for the same passages and seed.

    A large corpus is clustered by a random sample; then every passage goes to the centroid of highest cosine.

    Args:
        passages: `[M, D]`, finite; may be read part by part.
        count: C, how many clusters.
        seed: Of the sample and of the first centroids.

    Raises:
        DataError: If faiss is missing, there are fewer passages than clusters, or a cluster stays empty.
    """
    if len(passages) < count:
        raise DataError(
            f"the corpus has {len(passages)} passages, too few for {count} clusters; "
            "give a smaller --clusters"
        )
    faiss = load_faiss()
    rows = np.arange(len(passages))
    if len(rows) > SAMPLE * count:
        rows = np.sort(np.random.default_rng(seed).choice(len(rows), SAMPLE * count, replace=False))
    sample = unit(np.asarray(passages[rows], np.float32))
    kmeans = faiss.Kmeans(
        sample.shape[1],
        count,
        niter=ROUNDS,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=len(sample),
    )
    kmeans.train(sample)
    centroids = unit(np.asarray(kmeans.centroids, np.float32).reshape(count, -1))
    clusters = Clusters(centroids, nearest(passages, centroids))
    empty = np.flatnonzero(clusters.sizes() == 0)
    if len(empty):
        raise DataError(
            f"cluster {empty[0]} of {count} has no passage ({len(empty)} have none): too many passages are "
            "alike; give a smaller --clusters"
        )
    return clusters


def nearest(vectors: Rows, centroids: Float32[np.ndarray, "C D"]) -> Int32[np.ndarray, " n"]:
    """The centroid of highest cosine with each vector, the first of equals."""
    found = np.empty(len(vectors), np.int32)
    for start in range(0, len(found), ROWS):
        part = slice(start, start + ROWS)
        found[part] = np.argmax(np.asarray(vectors[part], np.float32) @ centroids.T, axis=1)
    return found


def load_faiss() -> Any:
    """The package faiss.

    Raises:
        DataError: If it is not installed.
    """
    try:
        return importlib.import_module("faiss")
    except ImportError:
        raise DataError('k-means needs faiss; run: pip install "prime-jax[search]"') from None

"""Tiers of hard negatives against a plain loop, and what is never one."""

from pathlib import Path

import numpy as np
import pytest

from prime_jax.data.clusters import Clusters, nearest
from prime_jax.data.embedded import EmbeddedDataset, embed_dataset
from prime_jax.data.hard_negatives import near_clusters, tiered_negatives
from prime_jax.data.records import Dataset, Example, Passage
from prime_jax.data.steered import pairs_of
from prime_jax.data.store import EmbeddingStore
from prime_jax.errors import DataError
from prime_jax.retrieval.vectors import unit

TIERS = (3, 4, 3, 2)


def embedded(folder: Path, dataset: Dataset, dim: int = 6) -> EmbeddedDataset:
    """Random directions for all texts."""
    texts = [passage.text for passage in dataset.corpus]
    texts += [example.query for rows in dataset.splits.values() for example in rows]
    texts = list(dict.fromkeys(texts))
    store = EmbeddingStore.open(folder, "random", dim)
    store.add(texts, unit(np.random.default_rng(5).normal(size=(len(texts), dim)).astype(np.float32)))
    return embed_dataset(dataset, store, max_context_length=1)


def clustered(data: EmbeddedDataset, count: int) -> Clusters:
    centroids = unit(np.random.default_rng(6).normal(size=(count, data.store.dim)).astype(np.float32))
    return Clusters(centroids, nearest(data.corpus(), centroids))


@pytest.fixture
def data(tmp_path: Path) -> EmbeddedDataset:
    """Two scopes, repeated questions, several answers, exclusions, and passages with equal texts."""
    random = np.random.default_rng(0)
    scopes = ["red" if number % 4 else "blue" for number in range(160)]
    corpus = tuple(Passage(f"p{at}", f"text {at % 150}", scope) for at, scope in enumerate(scopes))
    examples = []
    for number in range(60):
        scope = "red" if number % 3 else "blue"
        own = [f"p{at}" for at in range(160) if scopes[at] == scope]
        chosen = random.choice(own, size=6, replace=False).tolist()
        right, out = chosen[: 1 + number % 2], chosen[3 : 3 + number % 4]
        examples.append(
            Example(
                f"e{number}", (), f"question {number % 40}", tuple(right), exclude=tuple(out), scope=scope
            )
        )
    return embedded(tmp_path, Dataset(corpus, {"train": tuple(examples)}))


def forbidden(data: EmbeddedDataset, number: int) -> set[int]:
    """What is no negative of an example, the slow way."""
    split = data.splits["train"]
    right = {
        int(data.corpus_rows[row])
        for other, rows in enumerate(split.positives)
        if split.query_rows[other] == split.query_rows[number]
        for row in rows
    }
    alike = {row for row, stored in enumerate(data.corpus_rows.tolist()) if stored in right}
    elsewhere = set(np.flatnonzero(data.corpus_scope != split.scope[number]).tolist())
    return alike | elsewhere | set(split.exclude[number].tolist())


def test_every_tier_against_a_plain_loop(data: EmbeddedDataset) -> None:
    clusters = clustered(data, 8)
    table = tiered_negatives(data, "train", clusters, TIERS, seed=0)
    example, target = pairs_of(data.splits["train"])
    passages = data.corpus()
    near = near_clusters(clusters.centroids)
    assert near.shape == (8, 3)
    repeated = 0
    for row, number, right in zip(table, example, target, strict=True):
        never = forbidden(data, int(number))
        repeated += (
            len(never & set(np.flatnonzero(data.corpus_scope == data.splits["train"].scope[number]))) > 3
        )
        own = clusters.assignment[right]
        order = np.argsort(-(clusters.centroids @ clusters.centroids[own]), kind="stable")
        beside = [cluster for cluster in order.tolist() if cluster != own][:3]
        question = data.store[data.splits["train"].query_rows[[number]]][0]
        tiers = (
            ({own}, passages[right]),
            (set(beside), passages[right]),
            (set(range(8)) - {own, *beside}, question),
        )
        expected: list[int] = []
        for (among, vector), count in zip(tiers, TIERS, strict=False):
            free = [p for p in range(160) if clusters.assignment[p] in among and p not in never]
            best = sorted(free, key=lambda p: (-float(passages[p] @ vector), p))[:count]
            expected += best + [-1] * (count - len(best))
        assert row[:10].tolist() == expected
        drawn = row[10:].tolist()
        assert not set(drawn) & (never | set(expected) | {-1})
        assert len(set(drawn)) == 2
    assert repeated > 20  # there was something to leave out
    assert table.dtype == np.int32


def test_random_ones_depend_on_the_seed_only(data: EmbeddedDataset) -> None:
    clusters = clustered(data, 8)
    one, same, other = (tiered_negatives(data, "train", clusters, TIERS, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    np.testing.assert_array_equal(one[:, :10], other[:, :10])
    assert (one[:, 10:] != other[:, 10:]).any()


def test_random_ones_are_spread_over_all_that_may_be_drawn(tmp_path: Path) -> None:
    """300 draws of 2 out of the 38 passages that are neither right nor excluded: 15.8 of each expected."""
    corpus = tuple(Passage(f"p{at}", f"text {at}") for at in range(40))
    examples = tuple(Example(f"e{at}", (), f"q {at}", ("p0",), exclude=("p1",)) for at in range(300))
    small = embedded(tmp_path, Dataset(corpus, {"train": examples}))
    table = tiered_negatives(small, "train", clustered(small, 2), (0, 0, 0, 2), seed=0)
    drawn = np.bincount(table.ravel(), minlength=40)
    assert drawn[:2].tolist() == [0, 0]
    assert 4 < drawn[2:].min() <= drawn[2:].max() < 32  # three standard deviations of 3.9


def test_a_tier_that_runs_out_leaves_places_empty(tmp_path: Path) -> None:
    """Two clusters: the other one counts as near, so nothing is left for the third tier."""
    corpus = tuple(Passage(f"p{at}", f"text {at}") for at in range(14))
    small = embedded(tmp_path, Dataset(corpus, {"train": (Example("e", (), "q", ("p0",)),)}))
    table = tiered_negatives(small, "train", clustered(small, 2), TIERS, seed=0)
    assert table[0, 7:10].tolist() == [-1, -1, -1]
    assert (table[0, [0, 3, 10, 11]] >= 0).all()


def test_a_small_scope_never_borrows_from_another(tmp_path: Path) -> None:
    corpus = tuple(Passage(f"p{at}", f"text {at}", "tiny" if at < 4 else "rest") for at in range(30))
    example = Example("e", (), "q", ("p0",), exclude=("p1",), scope="tiny")
    small = embedded(tmp_path, Dataset(corpus, {"train": (example,)}))
    table = tiered_negatives(small, "train", clustered(small, 4), TIERS, seed=0)
    assert sorted(set(table[0].tolist())) == [-1, 2, 3]
    assert (table >= 0).sum() == 2


def test_too_few_passages(tmp_path: Path) -> None:
    corpus = tuple(Passage(f"p{at}", f"text {at}") for at in range(12))
    small = embedded(tmp_path, Dataset(corpus, {"train": (Example("e", (), "q", ("p0",)),)}))
    with pytest.raises(DataError, match=r"12 passages, too few for 12 hard negatives.*smaller --tiers"):
        tiered_negatives(small, "train", clustered(small, 2), TIERS, seed=0)

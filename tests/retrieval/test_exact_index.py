"""A corpus that is searched many times, on devices that keep it, stream it, or compute where it lies."""

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prime_jax.errors import DataError
from prime_jax.retrieval import topk
from prime_jax.retrieval.topk import ExactIndex, search

PLENTY = 2**40  # bytes
RNG = np.random.default_rng(0)
QUERIES = RNG.normal(size=(9, 24)).astype(np.float32)
CORPUS = RNG.normal(size=(300, 24)).astype(np.float16)


class Watched:
    """Rows that count how many of them were read."""

    def __init__(self, rows: np.ndarray):
        self._rows, self.shape, self.dtype = rows, rows.shape, rows.dtype
        self.read = self.most = 0

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, wanted: Any) -> np.ndarray:
        part = self._rows[wanted]
        self.read, self.most = self.read + len(part), max(self.most, len(part))
        return part


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs that are treated as GPUs: the corpus is kept, float16 is multiplied in halves."""
    as_if_gpus(monkeypatch)


def as_if_gpus(monkeypatch: pytest.MonkeyPatch, free: int = PLENTY) -> None:
    monkeypatch.setitem(topk._KINDS, "cpu", topk._KINDS["gpu"])
    monkeypatch.setattr(topk, "free_memory", lambda device: free)


def assert_best(
    found: tuple[np.ndarray, np.ndarray], queries: np.ndarray, corpus: np.ndarray, forbidden: np.ndarray
) -> None:
    """Scores are right to float32's accuracy, and no row that is left out is better by more than that."""
    scores, rows = found
    exact = queries.astype(np.float64) @ corpus.astype(np.float64).T
    room = (2.0**-21 + corpus.shape[1] * 2.0**-24) * (np.abs(queries) @ np.abs(corpus.astype(np.float32)).T)
    exact[forbidden] = -np.inf
    for number in range(len(queries)):
        real = rows[number][rows[number] >= 0]
        assert len(real) == min(scores.shape[1], np.isfinite(exact[number]).sum())
        assert len(set(real)) == len(real)
        off = np.abs(scores[number, : len(real)] - exact[number, real])
        assert (off <= room[number, real]).all()
        assert (np.diff(scores[number, : len(real)]) <= 0).all()
        assert (scores[number, len(real) :] == -np.inf).all()
        others = np.setdiff1d(np.arange(len(corpus)), real)
        if len(real) and len(others):
            worst = exact[number, real].min()
            assert (exact[number, others] <= worst + 2 * room[number].max()).all()


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["cpu", "resident", "streamed"]),
    dtype=st.sampled_from([np.float16, np.float32]),
    rows=st.sampled_from([1, 16, 17, 65]),
    k=st.sampled_from([1, 10, 250]),
    count=st.sampled_from([1, 2]),
)
def test_every_way_finds_the_best(seed: int, kind: str, dtype: type, rows: int, k: int, count: int) -> None:
    """Exclusions, scopes, k above M, edges of tiles, several devices, any size of the values."""
    rng = np.random.default_rng(seed)
    corpus = rng.normal(size=(rows, 8)).astype(dtype)
    queries = (rng.normal(size=(6, 8)) * 10.0 ** rng.integers(-12, 12, (6, 1))).astype(np.float32)
    exclude = [rng.integers(0, rows, number) for number in range(6)]
    query_scope, corpus_scope = rng.integers(0, 3, 6), rng.integers(0, 2, rows)
    forbidden = query_scope[:, None] != corpus_scope
    for number, entry in enumerate(exclude):
        forbidden[number, entry] = True
    with pytest.MonkeyPatch.context() as patch:
        if kind != "cpu":
            as_if_gpus(patch, PLENTY if kind == "resident" else 0)
        index = ExactIndex(corpus, corpus_scope, corpus_chunk=16, devices=jax.local_devices()[:count])
        for _ in range(2):
            found = index.search(queries, k, exclude=exclude, query_scope=query_scope, query_chunk=4)
            assert_best(found, queries, corpus, forbidden)
        assert index.resident == (kind == "resident")


@pytest.mark.usefixtures("gpu")
def test_ties_go_to_the_lower_row_in_halves_too() -> None:
    corpus = CORPUS.copy()
    corpus[[11, 150, 299]] = corpus[7]
    queries = corpus[7].astype(np.float32) + 0.1 * QUERIES
    _, found = ExactIndex(corpus, corpus_chunk=64).search(queries, 4)
    np.testing.assert_array_equal(found, np.tile([7, 11, 150, 299], (9, 1)))


@pytest.mark.usefixtures("gpu")
def test_a_kept_corpus_is_read_and_checked_once() -> None:
    corpus = Watched(CORPUS)
    index = ExactIndex(corpus, corpus_chunk=64)
    assert corpus.read == 0
    first = index.search(QUERIES, 5)
    assert (corpus.read, index.resident) == (300, True)
    again = index.search(QUERIES, 5)
    assert corpus.read == 300
    for one, other, streamed in zip(first, again, search(QUERIES, CORPUS, 5, corpus_chunk=64), strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one, streamed)


def test_what_does_not_fit_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 rows in tiles of 64 need 320 x 48 bytes beside the 786,432 of scores, and 70% may be taken."""
    need = 320 * 24 * 2 / topk.SHARE + 3 * 4 * 1024 * 64
    for free, resident in ((need + 1, True), (need - 1, False)):
        as_if_gpus(monkeypatch, int(free))
        corpus = Watched(CORPUS)
        index = ExactIndex(corpus, corpus_chunk=64)
        found = [index.search(QUERIES, 5) for _ in range(2)]
        assert (index.resident, corpus.read) == (resident, 300 if resident else 600)
        np.testing.assert_array_equal(*(rows for _, rows in found))


def test_a_cpu_keeps_nothing_and_looks_for_nan_once() -> None:
    corpus = Watched(CORPUS)
    index = ExactIndex(corpus, corpus_chunk=64)
    one, other = (index.search(QUERIES, 5) for _ in range(2))
    assert (index.resident, corpus.read, corpus.most) == (False, 600, 64)
    np.testing.assert_array_equal(one[1], other[1])


def test_a_device_that_does_not_say_has_no_memory_to_spare() -> None:
    assert topk.free_memory(jax.local_devices()[0]) == 0


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("row", [0, 130, 299])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_found_on_the_device(row: int, value: float, keep: bool) -> None:
    corpus = CORPUS.copy()
    corpus[row, 3] = value
    index = ExactIndex(corpus, corpus_chunk=64, keep=keep)
    for _ in range(2):  # it does not count as checked
        with pytest.raises(DataError, match=f"corpus row {row} contains NaN or Inf"):
            index.search(QUERIES, 3)
        assert not index.resident


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_overflow_is_found_for_later_queries_too(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "gpu":
        as_if_gpus(monkeypatch)
    index = ExactIndex(CORPUS)
    index.search(QUERIES, 3)
    with pytest.raises(DataError, match="overflow float32"):
        index.search(QUERIES * 1e37, 3)


def test_scopes_are_of_one_kind_and_for_both() -> None:
    index = ExactIndex(CORPUS, np.array(["a", "b"] * 150))
    _, rows = index.search(QUERIES, 2, query_scope=np.array(["b"] * 8 + ["c"]))
    assert (rows[:8] % 2 == 1).all()
    assert rows[8].tolist() == [-1, -1]
    with pytest.raises(DataError, match="for both"):
        index.search(QUERIES, 2)
    with pytest.raises(DataError, match="both of one kind"):
        index.search(QUERIES, 2, query_scope=np.zeros(9, int))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_on_a_gpu(dtype: type) -> None:
    """Kept and streamed, with exclusions, to float32's accuracy."""
    corpus = RNG.normal(size=(70_000, 128)).astype(dtype)
    queries = RNG.normal(size=(300, 128)).astype(np.float32)
    exclude = [RNG.integers(0, 70_000, 5) for _ in queries]
    forbidden = np.zeros((300, 70_000), bool)
    forbidden[np.arange(300)[:, None], np.stack(exclude)] = True
    index = ExactIndex(corpus)
    found = [index.search(queries, 10, exclude=exclude) for _ in range(2)]
    assert index.resident
    for answer in (*found, search(queries, corpus, 10, exclude=exclude)):
        assert_best(answer, queries, corpus, forbidden)
    broken = corpus.copy()
    broken[66_000, 7] = np.nan
    with pytest.raises(DataError, match="corpus row 66000 contains NaN or Inf"):
        ExactIndex(broken).search(queries, 10)


def test_signed_zeros_are_equal_and_go_to_the_lower_row() -> None:
    scores, found = search(np.zeros((1, 1), np.float32), np.array([[-1.0], [1.0], [-2.0]], np.float32), 3)
    np.testing.assert_array_equal(found, [[0, 1, 2]])
    assert not np.signbit(scores).any()


def test_signed_and_unsigned_scopes_are_compared_as_integers() -> None:
    """As float64, which numpy compares int64 and uint64 in, these two are one."""
    corpus_scope = np.array([2**60, 2**60 + 1], np.uint64)
    corpus, queries = np.ones((2, 3), np.float32), np.ones((3, 3), np.float32)
    query_scope = np.array([2**60 + 1, -1, 2**60], np.int64)
    _, found = search(queries, corpus, 1, query_scope=query_scope, corpus_scope=corpus_scope)
    np.testing.assert_array_equal(found, [[1], [-1], [0]])


@pytest.mark.parametrize("name", ["query_chunk", "corpus_chunk"])
def test_a_chunk_without_rows_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=f"{name} is -1, it must be 1 or more"):
        search(np.ones((2, 3), np.float32), np.ones((4, 3), np.float32), 1, **{name: -1})

import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prime_jax.errors import DataError
from prime_jax.retrieval.topk import search

CORPUS = np.array([[1, 0], [0, 1], [3, 4], [1, 0]], np.float32)
QUERIES = np.array([[1, 0], [0, 2]], np.float32)


def brute_force(queries, corpus, k, exclude, query_scope, corpus_scope):
    scores = np.full((len(queries), k), -np.inf, np.float32)
    found = np.full((len(queries), k), -1, np.int64)
    for number, query in enumerate(queries):
        allowed = [
            (-float(row @ query), index)
            for index, row in enumerate(corpus)
            if index not in exclude[number] and corpus_scope[index] == query_scope[number]
        ]
        for rank, (score, index) in enumerate(sorted(allowed)[:k]):
            scores[number, rank], found[number, rank] = -score, index
    return scores, found


def test_by_hand():
    scores, found = search(QUERIES, CORPUS, 3)
    np.testing.assert_array_equal(found, [[2, 0, 3], [2, 1, 0]])
    np.testing.assert_array_equal(scores, [[3, 1, 1], [8, 2, 0]])
    assert (scores.dtype, found.dtype) == (np.float32, np.int64)


def test_excluded_and_missing_rows_leave_empty_places():
    scores, found = search(QUERIES, CORPUS, 5, exclude=[np.array([2]), np.array([], np.int64)])
    np.testing.assert_array_equal(found, [[0, 3, 1, -1, -1], [2, 1, 0, 3, -1]])
    assert scores[0].tolist() == [1, 1, 0, -np.inf, -np.inf]


def test_scopes_may_be_strings():
    _, found = search(
        QUERIES, CORPUS, 2, query_scope=np.array(["a", "b"]), corpus_scope=np.array(["a", "b", "b", "other"])
    )
    np.testing.assert_array_equal(found, [[0, -1], [2, 1]])


def test_a_scope_without_rows_returns_nothing():
    scores, found = search(
        QUERIES[:1], CORPUS, 2, query_scope=np.array([7]), corpus_scope=np.zeros(4, np.int64)
    )
    assert found.tolist() == [[-1, -1]]
    assert scores.tolist() == [[-np.inf, -np.inf]]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equals_brute_force_with_ties_exclusions_and_scopes(data):
    # Small integers make every inner product exact, and most of them ties.
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    Q, M = data.draw(st.integers(0, 7)), data.draw(st.integers(1, 40))
    k, m = data.draw(st.sampled_from([1, 3, 50])), data.draw(st.sampled_from([4, 16, 64]))
    queries = rng.integers(-1, 2, (Q, 3)).astype(np.float32)
    corpus = rng.integers(-1, 2, (M, 3)).astype(np.float32)
    exclude = [rng.integers(0, M, data.draw(st.sampled_from([0, 2, 9]))) for _ in range(Q)]
    query_scope, corpus_scope = rng.integers(0, 3, Q), rng.integers(0, 2, M)
    scores, found = search(
        queries,
        corpus,
        k,
        exclude=exclude,
        query_scope=query_scope,
        corpus_scope=corpus_scope,
        query_chunk=4,
        corpus_chunk=m,
    )
    expected_scores, expected = brute_force(queries, corpus, k, exclude, query_scope, corpus_scope)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(scores, expected_scores)


def test_equal_rows_tie_by_row_whatever_the_chunks():
    rng = np.random.default_rng(0)
    corpus = rng.normal(size=(300, 48)).astype(np.float32)
    corpus[[11, 150, 299]] = corpus[7]
    queries = corpus[7] + 0.1 * rng.normal(size=(33, 48)).astype(np.float32)
    for query_chunk, corpus_chunk in itertools.product((16, 64), (32, 100, 4096)):
        _, found = search(queries, corpus, 4, query_chunk=query_chunk, corpus_chunk=corpus_chunk)
        np.testing.assert_array_equal(found, np.tile([7, 11, 150, 299], (33, 1)))


def test_a_neighbouring_query_changes_nothing():
    rng = np.random.default_rng(1)
    corpus, queries = (rng.normal(size=(rows, 24)).astype(np.float32) for rows in (200, 9))
    alone = [search(query[None], corpus, 10)[1][0] for query in queries]
    np.testing.assert_array_equal(search(queries, corpus, 10)[1], alone)


def test_reads_a_memory_map(tmp_path: Path):
    corpus = np.memmap(tmp_path / "corpus.bin", np.float32, "w+", shape=(70, 4))
    corpus[:] = np.random.default_rng(2).integers(-9, 10, (70, 4))
    _, found = search(np.asarray(corpus[:3]), corpus, 5, corpus_chunk=16)
    np.testing.assert_array_equal(found, np.argsort(-(corpus[:3] @ corpus.T), axis=1, kind="stable")[:, :5])


def test_half_precision_is_compared_in_single_precision() -> None:
    rng = np.random.default_rng(5)
    corpus = rng.normal(size=(300, 24)).astype(np.float16)
    queries = rng.normal(size=(7, 24)).astype(np.float32)
    halves = search(queries, corpus, 10, corpus_chunk=64)
    singles = search(queries, corpus.astype(np.float32), 10, corpus_chunk=64)
    for half, single in zip(halves, singles, strict=True):
        np.testing.assert_array_equal(half, single)


@pytest.mark.parametrize("rows", [3, 100, 301])
@pytest.mark.parametrize("count", [2, 8])
def test_devices_that_share_the_work_change_nothing(rows: int, count: int) -> None:
    """Ties, exclusions and scopes included, whether or not every device gets a full share."""
    rng = np.random.default_rng(6)
    corpus = rng.integers(-2, 3, (rows, 4)).astype(np.float32)
    queries = rng.integers(-2, 3, (9, 4)).astype(np.float32)
    exclude = [rng.integers(0, rows, size) for size in range(9)]
    scopes = {"query_scope": rng.integers(0, 2, 9), "corpus_scope": rng.integers(0, 2, rows)}
    alone = search(queries, corpus, 7, exclude=exclude, corpus_chunk=16, **scopes)
    devices = jax.local_devices()[:count]
    shared = search(queries, corpus, 7, exclude=exclude, corpus_chunk=16, devices=devices, **scopes)
    for one, other in zip(alone, shared, strict=True):
        np.testing.assert_array_equal(one, other)


NAN_ROW = np.array([[0, 0], [np.nan, 0]], np.float32)
BAD = {
    "two axes": {"queries": QUERIES[0]},
    "queries must be float32, the dtype is float64": {"queries": QUERIES.astype(np.float64)},
    "corpus must be float32 or float16, the dtype is int64": {"corpus": CORPUS.astype(np.int64)},
    "queries have 1 dimensions, the corpus 2": {"queries": QUERIES[:, :1]},
    "at least one": {"corpus": CORPUS[:0]},
    "k must be at least 1, it is 0": {"k": 0},
    "queries row 1 contains NaN or Inf": {"queries": NAN_ROW},
    "corpus row 5 contains NaN or Inf": {"corpus": np.concatenate([CORPUS, NAN_ROW]), "corpus_chunk": 4},
    "overflow": {"queries": QUERIES * 1e30, "corpus": CORPUS * 1e30},
    "exclude has 1 entries for 2 queries": {"exclude": [np.array([0])]},
    "exclude of query 1 names a row outside 0..3": {"exclude": [np.array([0]), np.array([4])]},
    "exclude of query 0 must be a 1-D integer array": {"exclude": [np.array([0.0]), np.array([1])]},
    "for both": {"query_scope": np.array([1, 2])},
    r"query_scope must have the shape \(2,\)": {
        "query_scope": np.zeros(3, int),
        "corpus_scope": np.zeros(4, int),
    },
    "scopes must be integers or strings; corpus_scope is float64": {
        "query_scope": np.zeros(2, int),
        "corpus_scope": np.zeros(4),
    },
    "scopes must be integers or strings; query_scope is object": {
        "query_scope": np.array([None, "a"], object),
        "corpus_scope": np.array(["a"] * 4),
    },
    "both of one kind": {"query_scope": np.array(["a", "b"]), "corpus_scope": np.zeros(4, int)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_a_clear_error(message):
    arguments = {"queries": QUERIES, "corpus": CORPUS, "k": 1} | BAD[message]
    with pytest.raises(DataError, match=message):
        search(**arguments)

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from prime_jax.data import first_pass as module
from prime_jax.data.first_pass import first_pass
from prime_jax.data.store import EmbeddingStore
from prime_jax.errors import DataError

NAMES = ["query", "near", "nearer", "nearest", "far"]
VECTORS = np.array([[1, 0], [1, 3], [2, 3], [3, 3], [0, 1]], np.float32)
QUERY, CORPUS = np.array([0, 0]), np.array([1, 2, 3, 4])
NOTHING = np.array([], np.int64)


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    store = EmbeddingStore.open(tmp_path, "test", 2)
    store.add(NAMES, VECTORS)
    return store


def found(
    store: EmbeddingStore,
    k: int = 3,
    exclude: tuple[list[int], list[int]] = ([], []),
    query_scope: tuple[int, int] = (-1, -1),
    corpus_scope: tuple[int, ...] = (-1, -1, -1, -1),
) -> list[list[int]]:
    return first_pass(
        store,
        QUERY,
        CORPUS,
        k,
        exclude=[np.array(ids, np.int64) for ids in exclude],
        query_scope=np.array(query_scope),
        corpus_scope=np.array(corpus_scope),
    ).tolist()


def test_the_best_passage_stands_last(store: EmbeddingStore) -> None:
    assert found(store) == [[0, 1, 2], [0, 1, 2]]


def test_excluded_passages_and_other_scopes_are_never_found(store: EmbeddingStore) -> None:
    assert found(store, exclude=([2], [])) == [[3, 0, 1], [0, 1, 2]]
    assert found(store, 2, query_scope=(0, 1), corpus_scope=(0, 0, 1, 1)) == [[0, 1], [3, 2]]


def test_where_too_few_remain_the_row_ends_with_minus_one(store: EmbeddingStore) -> None:
    assert found(store, exclude=([0, 2], [0, 1, 2, 3])) == [[3, 1, -1], [-1, -1, -1]]
    assert found(store, 6)[0] == [3, 0, 1, 2, -1, -1]


def test_the_same_search_runs_once(store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first = found(store)
    monkeypatch.setattr(module, "search", lambda *_, **__: pytest.fail("searched again"))
    assert found(store) == first
    reopened = EmbeddingStore.open(store.folder.parent, "test", 2)
    assert found(reopened) == first


def test_another_search_is_not_taken_for_the_same(store: EmbeddingStore) -> None:
    found(store)
    found(store, 2)
    found(store, exclude=([1], []))
    found(store, exclude=([], [1]))
    found(store, corpus_scope=(-1, -1, -1, 0))
    store.add(["new"], np.ones((1, 2), np.float32))
    found(store)
    assert len(list((store.folder / module.FOLDER).iterdir())) == 6


@pytest.mark.parametrize("damage", [b"", b"not safetensors at all"])
def test_a_damaged_result_is_named(store: EmbeddingStore, damage: bytes) -> None:
    found(store)
    (path,) = (store.folder / module.FOLDER).iterdir()
    path.write_bytes(damage)
    with pytest.raises(DataError, match=rf"{path.name}: damaged; delete it"):
        found(store)


def test_a_result_of_other_data_is_refused(store: EmbeddingStore) -> None:
    found(store)
    found(store, 2)
    small, large = sorted((store.folder / module.FOLDER).iterdir(), key=lambda path: path.stat().st_size)
    large.write_bytes(small.read_bytes())
    with pytest.raises(DataError, match="not the first search of this data"):
        found(store)


def test_a_changed_number_is_noticed(store: EmbeddingStore) -> None:
    found(store)
    (path,) = (store.folder / module.FOLDER).iterdir()
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # another passage, which exists as well
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path.name}: damaged or changed; delete it"):
        found(store)


def test_a_result_that_nothing_vouches_for_is_made_again(store: EmbeddingStore) -> None:
    right = found(store)
    (path,) = (store.folder / module.FOLDER).iterdir()
    save_file({"found": np.zeros((2, 3), np.int64)}, path)  # as version 0.1.0 wrote it, with other numbers
    assert found(store) == right
    assert found(store) == right


def test_a_folder_that_is_only_read_keeps_nothing(
    store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def read_only(path: Path) -> Iterator[Path]:
        raise PermissionError(path)
        yield path

    monkeypatch.setattr(module.files, "atomic_path", read_only)
    assert found(store) == [[0, 1, 2], [0, 1, 2]]
    assert not (store.folder / module.FOLDER).exists()

"""What an embedding store reads at a start: every changed shard is found, an unchanged one is read once."""

import json
import os
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prime_jax import files
from prime_jax.data import encode, shards
from prime_jax.data.prepare import prepare
from prime_jax.data.shards import NOTE
from prime_jax.data.store import INDEX, EmbeddingStore
from prime_jax.errors import DataError

ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    """Two shards of two rows."""
    filled = EmbeddingStore.open(tmp_path, "enc", 3)
    filled.add(["a", "b"], ROWS[:2])
    filled.add(["c", "d"], ROWS[2:])
    return filled


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards whose bytes were read, in order."""
    names: list[str] = []
    real = files.sha256

    def counting(path: Path) -> str:
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(shards.files, "sha256", counting)
    monkeypatch.setattr(shards, "_SETTLED", -1.0)  # what was just written is noted, too
    return names


FIRST, SECOND = "shard-00000.safetensors", "shard-00001.safetensors"


def test_an_unchanged_shard_is_read_once(store: EmbeddingStore, read: list[str]) -> None:
    store.verify(again=False)
    assert sorted(read) == [FIRST, SECOND]
    store.verify(again=False)
    assert len(read) == 2
    store.add(["e"], ROWS[:1] + 1)
    read.clear()
    store.verify(again=False)
    assert read == ["shard-00002.safetensors"]
    read.clear()
    store.verify()
    assert len(read) == 3


def test_noise_of_the_same_size_and_time_is_found(store: EmbeddingStore, read: list[str]) -> None:
    store.verify(again=False)
    path = store.folder / SECOND
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-100:-90] = b"0123456789"
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(
        DataError, match=rf"{SECOND}: damaged or changed, its SHA-256 differs from index.json"
    ):
        store.verify(again=False)
    read.clear()
    with pytest.raises(DataError, match=SECOND):  # and is not noted as whole
        store.verify(again=False)
    assert read == [SECOND]


def test_what_was_just_written_is_read_again(
    store: EmbeddingStore, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change within the same tick of a coarse clock would leave the same times."""
    monkeypatch.setattr(shards, "_SETTLED", 3600.0 * 24)
    store.verify(again=False)
    store.verify(again=False)
    assert len(read) == 4
    assert not (store.folder / NOTE).exists()


def test_a_shard_replaced_while_it_was_checked_is_not_noted(
    store: EmbeddingStore, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its facts must be those of the bytes that were hashed."""
    counting, path = files.sha256, store.folder / SECOND

    def replaced_after(shard: Path) -> str:
        digest = counting(shard)
        if shard == path and read.count(SECOND) == 1:
            noise = path.with_suffix(".new")
            noise.write_bytes(path.read_bytes()[:-10] + b"0123456789")
            noise.replace(path)
        return digest

    monkeypatch.setattr(shards.files, "sha256", replaced_after)
    for _ in range(2):
        with pytest.raises(DataError, match=f"{SECOND}: damaged or changed"):
            store.verify(again=False)


def test_a_shard_that_changes_all_the_time_is_refused_and_one_touched_once_is_not(
    store: EmbeddingStore, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counting, touches = files.sha256, [1]

    def touched(shard: Path) -> str:
        if shard.name == FIRST and touches:
            os.utime(shard, ns=(touches[0], touches.pop()))
        return counting(shard)

    monkeypatch.setattr(shards.files, "sha256", touched)
    store.verify(again=False)
    assert sorted(read) == [FIRST, FIRST, SECOND]
    store.verify(again=False)
    assert len(read) == 3
    touches += range(9, 1, -1)
    with pytest.raises(DataError, match=f"{FIRST}: changes while it is checked"):
        store.verify()


@pytest.mark.parametrize(
    "note", ["", "{", "[]", '{"shards": []}', '{"shards": {"shard-00000.safetensors": 1}}']
)
def test_a_damaged_note_costs_another_reading(store: EmbeddingStore, read: list[str], note: str) -> None:
    (store.folder / NOTE).write_text(note)
    store.verify(again=False)
    assert len(read) == 2
    store.verify(again=False)
    assert len(read) == 2


def test_a_note_of_another_index_is_not_believed(store: EmbeddingStore, read: list[str]) -> None:
    store.verify(again=False)
    index = json.loads((store.folder / INDEX).read_text())
    index["shards"][0]["sha256"] = "0" * 64
    (store.folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(DataError, match=FIRST):
        EmbeddingStore.open(store.folder.parent, "enc", 3).verify(again=False)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_no_number_is_named_by_file_and_row(store: EmbeddingStore, wrong: float) -> None:
    """An index that vouches for it: another program wrote both."""
    path = store.folder / SECOND
    tensors = load_file(path)
    tensors["embeddings"][1, 2] = wrong
    save_file(tensors, path)
    index = json.loads((store.folder / INDEX).read_text())
    index["shards"][1]["sha256"] = files.sha256(path)
    (store.folder / INDEX).write_text(json.dumps(index))
    opened = EmbeddingStore.open(store.folder.parent, "enc", 3)
    with pytest.raises(DataError, match=rf"{SECOND}: row 1 \(row 3 of the store\) holds NaN or Inf; delete"):
        opened.verify(again=False)


def test_a_folder_that_is_only_read_works(
    store: EmbeddingStore, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(shards.files, "write_json", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr("prime_jax.data.store.locked", refuse)
    opened = EmbeddingStore.open(store.folder.parent, "enc", 3)
    opened.verify(again=False)
    opened.verify(again=False)
    assert len(read) == 4
    np.testing.assert_array_equal(opened[opened.rows(["d"])], ROWS[3:])


def damage(folder: Path) -> str:
    """Noise of the same size in a shard of a data folder's store."""
    path = next(folder.glob("embeddings/*/shard-00000.safetensors"))
    content = bytearray(path.read_bytes())
    content[-400:-300] = bytes(range(100))
    path.write_bytes(content)
    return path.name


def test_preparing_and_encoding_check_what_they_reuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes.write_conversations(tmp_path)
    words = ["--data", str(tmp_path), "--encoder", "fakes:encoder"]
    assert encode.main(words) == 0
    name = damage(tmp_path)
    assert encode.main(words) == 2
    assert f"{name}: damaged or changed" in capsys.readouterr().err
    with pytest.raises(DataError, match=name):
        prepare(tmp_path, ("train", "dev"), fakes.encoder())

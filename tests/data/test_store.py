"""The embedding store: what goes in comes out, once, and nothing damaged is ever read."""

import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from prime_jax.data.store import EmbeddingStore
from prime_jax.errors import DataError

DIM = 3


def vectors(*firsts: float) -> np.ndarray:
    """Rows [x, 2x, 3x], so that a reader sees which row is which."""
    return np.outer(firsts, [1, 2, 3]).astype(np.float32)


def open_store(root: Path) -> EmbeddingStore:
    return EmbeddingStore.open(root, "enc/v1", DIM)


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    """Two shards: rows 0 and 1, then row 2."""
    filled = open_store(tmp_path)
    filled.add(["a", "b"], vectors(1, 2))
    filled.add(["c"], vectors(3))
    return filled


class TestReading:
    def test_rows_and_embeddings_over_shards(self, store: EmbeddingStore) -> None:
        rows = store.rows(["c", "a", "c", "b"])
        assert rows.tolist() == [2, 0, 2, 1]
        assert rows.dtype == np.int64
        np.testing.assert_array_equal(store[rows], vectors(3, 1, 3, 2))

    def test_any_index_shape(self, store: EmbeddingStore) -> None:
        picked = store[np.array([[0, 2], [1, 1]])]
        np.testing.assert_array_equal(picked, vectors(1, 3, 2, 2).reshape(2, 2, DIM))
        np.testing.assert_array_equal(store[np.array(2)], [3, 6, 9])
        assert store[np.zeros((0, 4), np.int32)].shape == (0, 4, DIM)

    def test_membership(self, store: EmbeddingStore) -> None:
        assert len(store) == 3
        assert "a" in store
        assert "d" not in store
        assert store.missing(["d", "a", "e", "d"]) == ["d", "e"]

    def test_a_text_that_is_not_there_is_quoted(self, store: EmbeddingStore) -> None:
        with pytest.raises(DataError, match=rf"no embedding of '{'x' * 57}\.\.\.'"):
            store.rows(["a", "x" * 500])

    @pytest.mark.parametrize("rows", [[-1], [0, 3], [[0.5]], [True]])
    def test_rows_that_do_not_exist(self, store: EmbeddingStore, rows: list[float]) -> None:
        with pytest.raises(DataError, match=r"rows -1|0 to 2|must be integers"):
            store[np.array(rows)]

    def test_embeddings_are_mapped_not_loaded(self, store: EmbeddingStore, tmp_path: Path) -> None:
        again = open_store(tmp_path)
        shard = again.folder / "shard-00000.safetensors"
        content = bytearray(shard.read_bytes())
        at = content.find(vectors(2).tobytes())
        with shard.open("r+b") as stream:
            stream.seek(at)
            stream.write(vectors(7).tobytes())
        np.testing.assert_array_equal(again[np.array([1])], vectors(7))

    def test_survives_pickling(self, store: EmbeddingStore) -> None:
        packed = pickle.dumps(store)
        assert len(packed) < 1000  # its place, not its content
        np.testing.assert_array_equal(pickle.loads(packed)[np.arange(3)], vectors(1, 2, 3))


class TestWriting:
    def test_opened_again(self, store: EmbeddingStore, tmp_path: Path) -> None:
        again = open_store(tmp_path)
        np.testing.assert_array_equal(again[again.rows(["c", "b", "a"])], vectors(3, 2, 1))
        assert again.hash == store.hash
        again.verify()

    def test_files_are_as_documented(self, store: EmbeddingStore) -> None:
        assert store.folder.name == "enc-v1"
        shard = load_file(store.folder / "shard-00000.safetensors")
        np.testing.assert_array_equal(shard["embeddings"], vectors(1, 2))
        assert shard["keys"][1].tobytes() == hashlib.sha256(b"b").digest()[:16]
        listed = json.loads((store.folder / "index.json").read_text())["shards"][1]
        content = (store.folder / listed["file"]).read_bytes()
        assert listed == {
            "file": "shard-00001.safetensors",
            "rows": 1,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }

    def test_the_first_embedding_of_a_text_stays(self, store: EmbeddingStore) -> None:
        store.add(["b", "d", "d"], vectors(9, 4, 5))
        assert len(store) == 4
        np.testing.assert_array_equal(store[store.rows(["b", "d"])], vectors(2, 4))
        before = store.hash
        store.add(["a"], vectors(9))
        assert store.hash == before

    def test_the_hash_names_the_content(self, tmp_path: Path) -> None:
        def filled(name: str, value: float) -> str:
            store = open_store(tmp_path / name)
            store.add(["a"], vectors(value))
            return store.hash

        assert filled("one", 1) == filled("two", 1)
        assert filled("three", 1.5) != filled("four", 1)

    @pytest.mark.parametrize(
        ("embeddings", "message"),
        [
            (vectors(1), r"must be float32 \(2, 3\), not float32 \(1, 3\)"),
            (np.ones((2, 4), np.float32), r"not float32 \(2, 4\)"),
            (np.ones(6, np.float32), r"not float32 \(6,\)"),
            (np.ones((2, 3)), r"not float64 \(2, 3\)"),
            (vectors(1, np.nan), r"the embedding of 'e' holds NaN or Inf \(1 of 2 do\)"),
            (vectors(np.inf, 1), r"the embedding of 'd' holds NaN or Inf"),
        ],
    )
    def test_malformed_embeddings(self, store: EmbeddingStore, embeddings: np.ndarray, message: str) -> None:
        before = store.hash
        with pytest.raises(DataError, match=message):
            store.add(["d", "e"], embeddings)
        assert store.hash == before
        assert store.missing(["d", "e"]) == ["d", "e"]

    def test_text_that_is_no_unicode(self, store: EmbeddingStore) -> None:
        with pytest.raises(DataError, match="not valid Unicode"):
            store.add(["\ud800"], vectors(1))

    @settings(max_examples=15, deadline=None)
    @given(
        st.lists(st.dictionaries(st.text(max_size=8), st.floats(-1e6, 1e6, width=32), max_size=5), max_size=4)
    )
    def test_round_trip(
        self, tmp_path_factory: pytest.TempPathFactory, blocks: list[dict[str, float]]
    ) -> None:
        root = tmp_path_factory.mktemp("store")
        first: dict[str, float] = {}
        for block in blocks:
            open_store(root).add(list(block), vectors(*block.values()).reshape(-1, DIM))
            first = block | first
        store = open_store(root)
        assert len(store) == len(first)
        np.testing.assert_array_equal(
            store[store.rows(list(first))], vectors(*first.values()).reshape(-1, DIM)
        )


class TestInterruption:
    def test_a_shard_the_index_does_not_list_is_overwritten(
        self, store: EmbeddingStore, tmp_path: Path
    ) -> None:
        orphan = store.folder / "shard-00002.safetensors"
        orphan.write_bytes(b"half a shard")
        again = open_store(tmp_path)
        assert "d" not in again
        again.add(["d"], vectors(4))
        np.testing.assert_array_equal(open_store(tmp_path)[np.array([3])], vectors(4))

    def test_two_openings_that_add_in_turns(self, store: EmbeddingStore, tmp_path: Path) -> None:
        other = open_store(tmp_path)
        store.add(["d"], vectors(4))
        other.add(["d", "e"], vectors(9, 5))
        assert other.rows(["d", "e"]).tolist() == [3, 4]
        np.testing.assert_array_equal(open_store(tmp_path)[np.array([3, 4])], vectors(4, 5))

    def test_processes_that_add_at_once(self, tmp_path: Path) -> None:
        code = (
            "import sys, numpy as np; from pathlib import Path\n"
            "from prime_jax.data.store import EmbeddingStore\n"
            "store = EmbeddingStore.open(Path(sys.argv[1]), 'enc', 2)\n"
            "for i in range(15):\n"
            "    own = f'{sys.argv[2]} {i}'\n"
            "    store.add([own, f'shared {i}'], np.full((2, 2), i, np.float32))\n"
        )
        running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in ("x", "y")]
        assert [process.wait() for process in running] == [0, 0]
        store = EmbeddingStore.open(tmp_path, "enc", 2)
        store.verify()
        assert len(store) == 45
        for name in ("x", "y", "shared"):
            values = store[store.rows([f"{name} {i}" for i in range(15)])]
            np.testing.assert_array_equal(values, np.arange(15)[:, None] * np.ones(2))


class TestDamage:
    def test_another_dim(self, store: EmbeddingStore, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="holds embeddings of 3 dimensions, the encoder has 4"):
            EmbeddingStore.open(tmp_path, "enc/v1", 4)

    def test_another_identity_with_the_same_folder_name(self, store: EmbeddingStore, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="of encoder 'enc/v1', not of 'enc v1'"):
            EmbeddingStore.open(tmp_path, "enc v1", DIM)

    @pytest.mark.parametrize("identity", ["", "..", "///"])
    def test_an_identity_that_names_no_folder(self, tmp_path: Path, identity: str) -> None:
        with pytest.raises(DataError, match="no letter or digit"):
            EmbeddingStore.open(tmp_path, identity, DIM)

    def test_a_missing_shard(self, store: EmbeddingStore, tmp_path: Path) -> None:
        (store.folder / "shard-00000.safetensors").unlink()
        with pytest.raises(DataError, match=r"shard-00000.safetensors: listed in index.json but missing"):
            open_store(tmp_path)

    def test_a_truncated_shard(self, store: EmbeddingStore, tmp_path: Path) -> None:
        shard = store.folder / "shard-00001.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(DataError, match=r"shard-00001.safetensors: \d+ bytes, index.json says \d+"):
            open_store(tmp_path)

    @pytest.mark.parametrize("start", [0, 8, 30])
    def test_a_damaged_header(self, store: EmbeddingStore, tmp_path: Path, start: int) -> None:
        shard = store.folder / "shard-00001.safetensors"
        content = bytearray(shard.read_bytes())
        content[start : start + 8] = b"\xff" * 8
        shard.write_bytes(content)
        with pytest.raises(DataError, match=r"shard-00001.safetensors: its header does not describe"):
            open_store(tmp_path)

    def test_a_header_that_describes_something_else(self, store: EmbeddingStore, tmp_path: Path) -> None:
        shard = store.folder / "shard-00001.safetensors"
        save_file({"embeddings": vectors(3).astype(np.float64), "keys": np.zeros((1, 16), np.uint8)}, shard)
        index = json.loads((store.folder / "index.json").read_text())
        index["shards"][1]["bytes"] = shard.stat().st_size
        (store.folder / "index.json").write_text(json.dumps(index))
        with pytest.raises(DataError, match="does not describe 1 embeddings of 3 dimensions"):
            open_store(tmp_path)

    def test_one_flipped_bit_is_found_by_verify(self, store: EmbeddingStore, tmp_path: Path) -> None:
        shard = store.folder / "shard-00000.safetensors"
        content = bytearray(shard.read_bytes())
        content[content.find(vectors(2).tobytes())] ^= 1
        shard.write_bytes(content)
        with pytest.raises(DataError, match=r"shard-00000.safetensors: damaged or changed"):
            open_store(tmp_path).verify()

    @pytest.mark.parametrize(
        ("key", "value"),
        [("dim", "three"), ("format_version", 2), ("shards", [{"file": "../x"}]), ("identity", None)],
    )
    def test_a_malformed_index(self, store: EmbeddingStore, tmp_path: Path, key: str, value: object) -> None:
        path = store.folder / "index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
        with pytest.raises(DataError, match=rf"index.json: not an index of an embedding store \({key}"):
            open_store(tmp_path)

    def test_a_shard_listed_twice(self, store: EmbeddingStore, tmp_path: Path) -> None:
        path = store.folder / "index.json"
        index = json.loads(path.read_text())
        index["shards"].append(index["shards"][0])
        path.write_text(json.dumps(index))
        with pytest.raises(DataError, match="holds a key twice"):
            open_store(tmp_path)

    def test_a_store_replaced_while_open(self, store: EmbeddingStore) -> None:
        path = store.folder / "index.json"
        index = json.loads(path.read_text())
        path.write_text(json.dumps(index | {"shards": index["shards"][1:]}))
        with pytest.raises(DataError, match="replaced while the store was open"):
            store.add(["d"], vectors(4))


class TestHalfPrecision:
    def test_is_kept_on_disk_and_read_as_single(self, tmp_path: Path) -> None:
        made = EmbeddingStore.open(tmp_path, "enc/v1", DIM, "float16")
        made.add(["a", "b"], np.array([[0.1, 1, 2], [3, 4, 5]], np.float32))
        again = open_store(tmp_path)  # takes what is there
        assert again.dtype == "float16"
        found = again[again.rows(["b", "a"])]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, np.array([[3, 4, 5], [0.1, 1, 2]], np.float16))
        kept = load_file(next(again.folder.glob("shard-*")))
        assert kept["embeddings"].dtype == np.float16

    def test_cannot_be_mixed(self, store: EmbeddingStore, tmp_path: Path) -> None:
        assert store.dtype == "float32"
        with pytest.raises(DataError, match="keeps float32, float16 was asked for"):
            EmbeddingStore.open(tmp_path, "enc/v1", DIM, "float16")

    def test_refuses_what_it_cannot_hold(self, tmp_path: Path) -> None:
        made = EmbeddingStore.open(tmp_path, "enc/v1", DIM, "float16")
        with pytest.raises(DataError, match="too large for float16"):
            made.add(["a"], vectors(1e5))
        assert len(made) == 0

    def test_a_store_of_single_precision_looks_as_it_always_did(self, store: EmbeddingStore) -> None:
        """Its index and its hash, which checkpoints and kept searches are named by."""
        assert "dtype" not in json.loads((store.folder / "index.json").read_text())


def test_some_rows_are_an_array_that_is_read_in_parts(store: EmbeddingStore) -> None:
    part = store.part(np.array([2, 0, 1]))
    assert (part.shape, part.ndim, part.dtype, len(part)) == ((3, DIM), 2, np.float32, 3)
    np.testing.assert_array_equal(part[:], vectors(3, 1, 2))
    np.testing.assert_array_equal(part[1:], vectors(1, 2))
    np.testing.assert_array_equal(part[np.array([[0], [2]])], vectors(3, 2)[:, None])
    np.testing.assert_array_equal(part[[2]], vectors(2))

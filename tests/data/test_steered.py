"""Steering read back: the right vector for every example, from disk, and nothing that does not belong."""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import BagOfWords
from safetensors.numpy import load_file, save_file
from topics import TOPICS, open_topics, topics

from prime_jax.data.embedded import EmbeddedDataset, gather
from prime_jax.data.pipeline import TrainingBatches
from prime_jax.data.records import load_dataset, write_dataset
from prime_jax.data.steered import (
    LEAKY,
    VARIANTS,
    Extended,
    Steering,
    open_steering,
    pairs_of,
    steered,
    steering_rows,
)
from prime_jax.data.steering import build_steering
from prime_jax.data.store import EmbeddingStore
from prime_jax.errors import CheckpointError, ConfigError, DataError
from prime_jax.manifest import MANIFEST, write_manifest

ENCODER = "bag-of-words"

Change = Callable[[Any], Any]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steered")
    topics(folder, splits=("train", "dev", "test"))
    build_steering(folder, BagOfWords(), clusters=TOPICS)
    return folder


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "data"))


def opened(folder: Path, *splits: str) -> tuple[EmbeddedDataset, Steering]:
    data = open_topics(folder, splits or ("train", "dev"))
    return data, open_steering(folder / "steering", data, ENCODER)


def first_pairs(data: EmbeddedDataset, split: str) -> np.ndarray:
    return np.unique(pairs_of(data.splits[split])[0], return_index=True)[1]


def rewrite(folder: Path, **facts: object) -> None:
    """A new manifest that vouches for files as they are now."""
    manifest = json.loads((folder / MANIFEST).read_text())
    kept = {k: v for k, v in manifest.items() if k not in ("kind", "format_version", "files", "sha256")}
    (folder / MANIFEST).unlink()
    write_manifest(folder, "steering", **{**kept, **facts})


def with_inf(array: np.ndarray, row: int) -> np.ndarray:
    array[row, 1, 2] = np.inf
    return array


class TestSteered:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_one_turn_that_is_the_vector_of_the_first_pair(self, variant: str, built: Path) -> None:
        data, steering = opened(built)
        changed = steered(data, steering, variant)
        for name, split in changed.splits.items():
            context, mask, query = split.arrays(changed.store)
            wanted = steering.vectors(name)[first_pairs(data, name), VARIANTS.index(variant)]
            np.testing.assert_array_equal(context, wanted[:, None])
            np.testing.assert_array_equal(mask[:, 0], wanted.any(axis=1))
            np.testing.assert_array_equal(query, data.splits[name].arrays(data.store)[2])
            lengths = np.linalg.norm(context[mask], axis=1)
            np.testing.assert_allclose(lengths, 1, atol=1e-5)
            assert (~mask).sum() == (1 if variant == "keyword" else 0)
            assert replace(split, context_rows=data.splits[name].context_rows) == data.splits[name]
        np.testing.assert_array_equal(changed.corpus(), data.corpus())
        assert (changed.context_from, changed.data_hash) == (data.context_from, data.data_hash)

    def test_zero_is_no_turn(self, built: Path) -> None:
        data, steering = opened(built)
        changed = steered(data, steering, "zero")
        context, mask, _ = changed.splits["dev"].arrays(changed.store)
        assert context.shape == (40, 1, 24)
        assert not context.any()
        assert not mask.any()

    def test_one_store_for_all_variants_whatever_the_splits(self, built: Path) -> None:
        data, steering = opened(built)
        keyword, predicted = (steered(data, steering, name) for name in ("keyword", "predicted"))
        assert keyword.store is predicted.store is steered(keyword, steering, "zero").store
        # 56 pairs in each of three splits, four variants
        assert len(keyword.store) == len(data.store) + 3 * 56 * 4
        test, same = opened(built, "test")
        assert (
            steered(test, same, "predicted").splits["test"].context_rows[0, 0]
            == len(test.store) + 2 * 224 + 3
        )

    def test_an_unknown_variant(self, built: Path) -> None:
        with pytest.raises(
            ConfigError, match="no steering 'centre': there are zero, centroid, keyword, residual"
        ):
            steered(*opened(built), "centre")
        assert set(LEAKY) <= set(VARIANTS)

    def test_a_split_that_was_not_built(self, copy: Path) -> None:
        data, steering = opened(copy)
        strange = replace(data, splits={"other": data.splits["dev"]})
        with pytest.raises(DataError, match="was not built for the split 'other'; run python -m"):
            steered(strange, steering, "keyword")

    def test_batches_are_read_from_it(self, built: Path) -> None:
        data, steering = opened(built)
        changed = steered(data, steering, "residual")
        batch = next(TrainingBatches(changed, "train", batch_size=8, seed=0))
        first = first_pairs(data, "train")[batch.example]
        np.testing.assert_array_equal(batch.context[:, 0], steering.vectors("train")[first, 2])


class TestRows:
    def test_each_pair_and_variant(self, built: Path) -> None:
        data, steering = opened(built)
        changed = steered(data, steering, "zero")
        pairs = np.repeat(np.arange(56), 5)
        codes = np.tile(np.arange(5), 56)
        for split in ("train", "dev"):
            rows = steering_rows(changed, steering, split, pairs, codes)
            vectors, mask = gather(changed.store, rows)
            with_zero = np.concatenate([np.zeros((56, 1, 24), np.float32), steering.vectors(split)], axis=1)
            np.testing.assert_array_equal(vectors[:, 0], with_zero.reshape(-1, 24))
            np.testing.assert_array_equal(mask[:, 0], with_zero.reshape(-1, 24).any(axis=1))

    @pytest.mark.parametrize(
        ("pair", "code", "said"), [(56, 1, "no pair 56"), (-1, 1, "no pair -1"), (0, 5, "no variant 5")]
    )
    def test_what_is_not_there(self, pair: int, code: int, said: str, built: Path) -> None:
        data, steering = opened(built)
        changed = steered(data, steering, "zero")
        with pytest.raises(DataError, match=said):
            steering_rows(changed, steering, "dev", np.array([pair]), np.array([code]))

    def test_another_store(self, built: Path) -> None:
        data, steering = opened(built)
        one = np.array([0])
        with pytest.raises(DataError, match="not made by steered"):
            steering_rows(data, steering, "dev", one, one)
        with pytest.raises(DataError, match="not made by steered"):
            steering_rows(steered(*opened(built), "zero"), steering, "dev", one, one)


class TestExtended:
    def small(self, folder: Path) -> tuple[EmbeddingStore, Extended]:
        store = EmbeddingStore.open(folder, "numbers", 2)
        store.add(["a", "b", "c"], np.array([[0, 1], [1, 1], [2, 1]], np.float32))
        return store, Extended(store, np.array([[10, 0], [11, 0]], np.float32))

    def test_rows_of_the_store_then_more(self, tmp_path: Path) -> None:
        store, view = self.small(tmp_path)
        assert len(view) == 5
        assert view[[[4, 0], [2, 3]]].tolist() == [[[11, 0], [0, 1]], [[2, 1], [10, 0]]]
        assert view[np.array([], np.int64)].shape == (0, 2)
        assert view[3].tolist() == [10, 0]
        part = view.part(np.array([3, 1, 4]))
        assert (part.shape, part[1:].tolist()) == ((3, 2), [[1, 1], [11, 0]])
        assert part.in_stored_dtype.dtype == np.float32
        same = ("identity", "dim", "dtype", "hash", "folder")
        assert [getattr(view, name) for name in same] == [getattr(store, name) for name in same]

    def test_only_rows_of_a_float16_store_are_kept_in_float16(self, tmp_path: Path) -> None:
        store = EmbeddingStore.open(tmp_path, "numbers", 2, "float16")
        store.add(["a", "b"], np.array([[0, 1], [1, 0.1]], np.float32))
        view = Extended(store, np.array([[0.1, 0]], np.float32))
        halves, mixed = (
            view.part(np.array([1, 0])).in_stored_dtype,
            view.part(np.array([2, 0])).in_stored_dtype,
        )
        assert (halves.dtype, mixed.dtype) == (np.float16, np.float32)
        assert halves[:].tolist() == [[1, float(np.float16(0.1))], [0, 1]]
        assert mixed[0].tolist() == [float(np.float32(0.1)), 0]

    @pytest.mark.parametrize("rows", [[5], [-1], [0.0]])
    def test_no_such_row(self, rows: list[int], tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no such rows among 0 to 4"):
            self.small(tmp_path)[1][rows]

    def test_no_row_moves_when_the_store_grows(self, tmp_path: Path) -> None:
        store, view = self.small(tmp_path)
        assert view.missing(["a", "d"]) == ["d"]
        assert "d" not in view
        view.add(["d"], np.array([[3, 1]], np.float32))
        assert "d" in view
        assert view.rows(["d", "a"]).tolist() == [5, 0]
        assert view[[5, 4, 3, 2]].tolist() == [[3, 1], [11, 0], [10, 0], [2, 1]]
        assert (len(store), len(view)) == (4, 6)
        view.verify()

    def test_another_width(self, tmp_path: Path) -> None:
        store = self.small(tmp_path)[0]
        with pytest.raises(DataError, match=r"rows of 2 dimensions, not \(1, 3\)"):
            Extended(store, np.zeros((1, 3), np.float32))

    def test_it_pickles_as_places_on_disk(self, built: Path) -> None:
        data, steering = opened(built)
        store = steered(data, steering, "zero").store
        pickled = pickle.dumps(store)
        assert len(pickled) < 2000  # the vectors take 64,512 bytes
        rows = np.array([0, len(data.store) + 300])
        np.testing.assert_array_equal(pickle.loads(pickled)[rows], store[rows])


class TestOpening:
    def test_large_arrays_stay_on_disk(self, built: Path) -> None:
        _, steering = opened(built)
        for array in (steering.vectors, steering.clusters, steering.predicted, steering.negatives):
            assert isinstance(array("train"), np.memmap)
            assert not array("train").flags.writeable
            assert array("train") is array("train")
        assert steering.vectors("test").dtype == np.float32
        assert steering.negatives("test").shape == (56, 12)
        assert steering.splits == ("train", "dev", "test")

    def test_any_choice_of_splits(self, built: Path) -> None:
        hashes = {opened(built, *names)[1].hash for names in (("test",), ("train", "dev"), ("dev",))}
        assert len(hashes) == 1
        assert hashes == {json.loads((built / "steering" / MANIFEST).read_text())["sha256"]}

    def test_no_folder(self, built: Path) -> None:
        with pytest.raises(DataError, match=r"there is no steering; run python -m prime_jax\.data\.steering"):
            open_steering(built / "none", open_topics(built), ENCODER)

    def test_one_bit(self, copy: Path) -> None:
        path = copy / "steering/steering_dev.npy"
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"steering_dev\.npy: damaged or changed"):
            opened(copy)

    def test_a_truncated_file(self, copy: Path) -> None:
        path = copy / "steering/negatives_dev.npy"
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(CheckpointError, match=r"negatives_dev\.npy: \d+ bytes"):
            opened(copy)
        rewrite(copy / "steering")
        with pytest.raises(DataError, match=r"negatives_dev\.npy: cannot be read"):
            opened(copy)

    def test_another_encoder_or_prefix(self, built: Path) -> None:
        data = open_topics(built)
        with pytest.raises(DataError, match="was built with encoder bag-of-words, the data has other"):
            open_steering(built / "steering", data, "other")
        with pytest.raises(DataError, match=r"was built with the prefixes \['', ''\], not \['q: ', ''\]"):
            open_steering(built / "steering", data, ENCODER, query_prefix="q: ")

    @pytest.mark.parametrize("file", ["corpus", "dev"])
    def test_other_texts(self, file: str, copy: Path) -> None:
        dataset = load_dataset(copy)
        if file == "corpus":
            corpus = (replace(dataset.corpus[0], text="topic0 other"), *dataset.corpus[1:])
            write_dataset(copy, replace(dataset, corpus=corpus))
        else:
            dev = (replace(dataset.splits["dev"][0], query="ask0 other"), *dataset.splits["dev"][1:])
            write_dataset(copy, replace(dataset, splits={**dataset.splits, "dev": dev}))
            opened(copy, "train")  # which did not change
        with pytest.raises(DataError, match="was built from other texts; run python -m"):
            opened(copy)

    @pytest.mark.parametrize(
        ("file", "change", "said"),
        [
            ("clusters_dev", lambda a: a[:-1], "clusters_dev.npy: does not hold 56 rows .* from 0 to 3;"),
            ("clusters_dev", lambda a: a * 0 + 4, "clusters_dev.npy: does not hold"),
            ("predicted_train", lambda a: a - 5, "predicted_train.npy: does not hold"),
            ("negatives_dev", lambda a: a + 48, "negatives_dev.npy: does not hold 56 rows .* from -1 to 47;"),
            ("negatives_dev", lambda a: a.astype(np.int64), "negatives_dev.npy: does not hold"),
            ("steering_dev", lambda a: a[1:], r"shape \(55, 4, 24\), not \(56, 4, 24\)"),
            ("steering_dev", lambda a: a[:, :3], r"steering_dev.npy: has the shape"),
            ("steering_dev", lambda a: with_inf(a, 7), r"steering_dev.npy: row 7 holds NaN or Inf"),
        ],
    )  # fmt: skip
    def test_arrays_that_do_not_fit(self, file: str, change: Change, said: str, copy: Path) -> None:
        path = copy / f"steering/{file}.npy"
        np.save(path, change(np.load(path)))
        rewrite(copy / "steering")
        with pytest.raises(DataError, match=said):
            opened(copy)

    @pytest.mark.parametrize(
        ("name", "change", "said"),
        [
            ("centroids", lambda a: np.where(a == a[2], np.nan, a), "centroid 2 holds NaN"),
            ("centroids", lambda a: a * 1.001, "centroid 0 holds NaN or is not of length 1"),
            ("centroids", lambda a: a[:3], "4 centroids of 24 dimensions wanted"),
            ("assignment", lambda a: a[:-1], "does not give each of 48 passages one of 4 clusters"),
            ("assignment", lambda a: a + 1, "does not give each of 48 passages"),
        ],
    )  # fmt: skip
    def test_clusters_that_do_not_fit(self, name: str, change: Change, said: str, copy: Path) -> None:
        path = copy / "steering/clusters.safetensors"
        tensors = load_file(path)
        changed = change(tensors[name])
        save_file({**tensors, name: changed.astype(tensors[name].dtype)}, path)
        rewrite(copy / "steering")
        with pytest.raises(DataError, match=said):
            opened(copy)

    def test_a_folder_of_another_version(self, copy: Path) -> None:
        save_file({"centroids": np.zeros((4, 24), np.float32)}, copy / "steering/clusters.safetensors")
        rewrite(copy / "steering")
        with pytest.raises(DataError, match=r"not steering of this version \('assignment'\); run python -m"):
            opened(copy)

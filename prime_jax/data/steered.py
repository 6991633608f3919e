"""Steering read back: a second input beside the question that says where to look (JASPER).

`python -m prime_jax.data.steering` writes the folder that is read here. Its vectors are found by row numbers
behind those of the embedding store, so that whatever reads turns from a store reads steering in their place.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Int64
from safetensors import SafetensorError
from safetensors.numpy import load_file

from prime_jax import files
from prime_jax.data.embedded import EMPTY, EmbeddedDataset, EmbeddedSplit
from prime_jax.data.extended import Extended, SteeringVectors, mapped
from prime_jax.data.store import EmbeddingStore
from prime_jax.errors import ConfigError, DataError
from prime_jax.manifest import verify_manifest

KIND = "steering"
STEERING = "steering"  # its folder, beside the texts
VARIANTS = ("centroid", "keyword", "residual", "predicted")
ZERO = "zero"  # no steering; needs no storage
LEAKY = ("centroid",)  # made from the right answer: what they score says nothing about a real question
AGAIN = "run python -m prime_jax.data.steering again"
_CHUNK = 4096
_UNIT = 1e-4  # how far from 1 the length of a centroid may be


def pairs_of(split: EmbeddedSplit) -> tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"]]:
    """Example and right answer (corpus row) of every pair, example by example in the order of `positives`."""
    counts = [len(ids) for ids in split.positives]
    return np.repeat(np.arange(len(counts)), counts), np.concatenate(split.positives)


def variant_code(variant: str) -> int:
    """0 for "zero", otherwise 1 + its place in `VARIANTS`.

    Raises:
        ConfigError: If there is no such variant.
    """
    known = (ZERO, *VARIANTS)
    if variant not in known:
        raise ConfigError(f"no steering {variant!r}: there are {', '.join(known)}")
    return known.index(variant)


@dataclass(frozen=True, eq=False)
class Steering:
    """An opened folder of steering; its large arrays stay on disk. Made by `open_steering`.

    Attributes:
        folder: Where it is.
        centroids: Unit centroids of the clusters, `[C, D]`.
        names: A name for each cluster, C of them.
        assignment: Cluster of each passage, `[M]`.
        facts: Its manifest.
    """

    folder: Path
    centroids: Float32[np.ndarray, "C D"]
    names: tuple[str, ...]
    assignment: Int32[np.ndarray, " M"]
    facts: Mapping[str, Any]
    _kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def hash(self) -> str:
        """SHA-256 of the manifest, which names the SHA-256 of every file."""
        return str(self.facts["sha256"])

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits it was built for."""
        return tuple(self.facts["pairs"])

    def vectors(self, split: str) -> np.ndarray:
        """Steering of each pair in each of `VARIANTS`, `[pairs, 4, D]` float32, memory-mapped.

        Raises:
            DataError: If it was not built for this split; so do the other three.
        """
        return self._array("steering", split)

    def clusters(self, split: str) -> np.ndarray:
        """Cluster of each pair's right answer, `[pairs]` int32, memory-mapped."""
        return self._array("clusters", split)

    def predicted(self, split: str) -> np.ndarray:
        """Cluster that was predicted from each pair's question, `[pairs]` int32, memory-mapped."""
        return self._array("predicted", split)

    def negatives(self, split: str) -> np.ndarray:
        """Corpus rows of each pair's hard negatives, -1 for none, `[pairs, T]` int32, memory-mapped."""
        return self._array("negatives", split)

    def extended(self, store: EmbeddingStore) -> Extended:
        """The store with the vectors of all splits behind its rows; always the same one for a store."""
        if "vectors" not in self._kept:
            self._kept["vectors"] = SteeringVectors([self._path("steering", split) for split in self.splits])
        vectors = self._kept["vectors"]
        if isinstance(store, Extended) and store.extra is vectors:
            return store
        if id(store) not in self._kept:  # the view keeps the store, so its id stays taken
            self._kept[id(store)] = Extended(store, vectors)
        view: Extended = self._kept[id(store)]
        return view

    def first_vector(self, split: str) -> int:
        """Which of the extra rows of `extended` is the first of this split."""
        self._path("steering", split)
        before = self.splits[: self.splits.index(split)]
        return len(VARIANTS) * sum(int(self.facts["pairs"][name]) for name in before)

    def _array(self, what: str, split: str) -> np.ndarray:
        path = self._path(what, split)
        if path not in self._kept:
            self._kept[path] = mapped(path)
        array: np.ndarray = self._kept[path]
        return array

    def _path(self, what: str, split: str) -> Path:
        if split not in self.splits:
            raise DataError(f"{self.folder}: was not built for the split '{split}'; {AGAIN}")
        return self.folder / f"{what}_{split}.npy"


def open_steering(
    folder: Path, data: EmbeddedDataset, encoder: str, *, query_prefix: str = "", passage_prefix: str = ""
) -> Steering:
    """Open a folder of steering and check that it belongs to a dataset.

    Args:
        folder: What `python -m prime_jax.data.steering` wrote.
        data: The dataset it is to steer.
        encoder: Identity of the encoder of its store.
        query_prefix: What was put before questions when they were encoded.
        passage_prefix: What was put before passages when they were encoded.

    Raises:
        CheckpointError: If a file is missing, damaged, changed or added.
        DataError: If there is no such folder, or it was built with another encoder, from other texts or for
            other splits, or an array does not fit the data.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no steering; run python -m prime_jax.data.steering on the data")
    facts = verify_manifest(folder, KIND)
    try:
        tensors = load_file(folder / "clusters.safetensors")
        centroids, assignment = tensors["centroids"], tensors["assignment"]
        names = tuple(str(entry["name"]) for entry in files.read_json(folder / "names.json"))
        wanted = operator.itemgetter("encoder", "data_hashes", "pairs", "query_prefix", "passage_prefix")
        built, hashes, pairs, *prefixes = wanted(facts)
    except (SafetensorError, OSError, KeyError, TypeError) as wrong:
        raise DataError(f"{folder}: not steering of this version ({wrong}); {AGAIN}") from None
    if built != encoder:
        raise DataError(f"{folder}: was built with encoder {built}, the data has {encoder}; {AGAIN}")
    if prefixes != [query_prefix, passage_prefix]:
        raise DataError(
            f"{folder}: was built with the prefixes {prefixes}, not {[query_prefix, passage_prefix]}; {AGAIN}"
        )
    if data.data_hash not in hashes.values():
        raise DataError(f"{folder}: was built from other texts; {AGAIN}")
    _check_clusters(folder, centroids, assignment, len(names), len(data.corpus_rows), data.store.dim)
    steering = Steering(folder, centroids, names, assignment, facts)
    for split in pairs:
        count = sum(map(len, data.splits[split].positives)) if split in data.splits else pairs[split]
        _check_split(steering, split, count)
    return steering


def steered(data: EmbeddedDataset, steering: Steering, variant: str) -> EmbeddedDataset:
    """The same dataset with one turn for each example: the steering of its first pair.

    Its store is `steering.extended(data.store)`, one for all variants. There is no turn where the variant is
    "zero" or the vector is zero, as for a question without keywords.

    Args:
        data: The dataset that `steering` was opened for.
        steering: Its steering.
        variant: One of `VARIANTS`, or "zero".

    Raises:
        ConfigError: If there is no such variant.
        DataError: If there is no steering for a split of the data.
    """
    code = variant_code(variant)
    changed = replace(data, store=steering.extended(data.store))
    splits = {}
    for name, split in data.splits.items():
        counts = np.array([len(ids) for ids in split.positives], np.int64)
        first = np.cumsum(counts) - counts
        rows = steering_rows(changed, steering, name, first, np.full(len(first), code))
        splits[name] = replace(split, context_rows=rows, windowed=0)
    return replace(changed, splits=splits)


def steering_rows(
    data: EmbeddedDataset,
    steering: Steering,
    split: str,
    pairs: Int64[np.ndarray, " b"],
    codes: Int64[np.ndarray, " b"],
) -> Int64[np.ndarray, "b 1"]:
    """Store rows of the steering of some pairs, for `prime_jax.data.embedded.gather`.

    Args:
        data: As `steered` gave it, for whatever variant.
        steering: What it was steered with.
        split: Name of the split.
        pairs: Numbers of the pairs, in the order of `pairs_of`.
        codes: For each of them 0 for no steering, or 1 + the place in `VARIANTS`.

    Returns:
        Rows of `data.store`, -1 where there is no steering or it is zero.

    Raises:
        DataError: If the store is not that of `steered`, or there is no such pair or code.
    """
    store = data.store
    if not isinstance(store, Extended) or steering.extended(store) is not store:
        raise DataError(f"{steering.folder}: these data were not made by steered() with this steering")
    vectors = steering.vectors(split)
    for name, numbers, end in (("pair", pairs, len(vectors)), ("variant", codes, len(VARIANTS) + 1)):
        wrong = numbers[(numbers < 0) | (numbers >= end)]
        if wrong.size:
            raise DataError(f"{steering.folder}: {split} has no {name} {wrong[0]}, only 0 to {end - 1}")
    rows = np.full((len(pairs), 1), EMPTY, np.int64)
    start = store.first + steering.first_vector(split)
    for at in range(0, len(pairs), _CHUNK):
        pair, code = pairs[at : at + _CHUNK], codes[at : at + _CHUNK]
        given = vectors[pair, np.maximum(code - 1, 0)].any(axis=1) & (code > 0)
        rows[at : at + _CHUNK, 0] = np.where(given, start + pair * len(VARIANTS) + code - 1, EMPTY)
    return rows


def _check_clusters(
    folder: Path, centroids: np.ndarray, assignment: np.ndarray, names: int, passages: int, dim: int
) -> None:
    place = folder / "clusters.safetensors"
    if centroids.dtype != np.float32 or centroids.shape != (names, dim):
        raise DataError(
            f"{place}: {names} centroids of {dim} dimensions wanted, not {centroids.shape}; {AGAIN}"
        )
    lengths = np.linalg.norm(centroids, axis=1)
    wrong = np.flatnonzero(~(np.abs(lengths - 1) < _UNIT))
    if wrong.size:
        raise DataError(f"{place}: centroid {wrong[0]} holds NaN or is not of length 1; {AGAIN}")
    fits = assignment.dtype == np.int32 and assignment.shape == (passages,)
    if not fits or assignment.min() < 0 or assignment.max() >= names:
        raise DataError(
            f"{place}: does not give each of {passages} passages one of {names} clusters; {AGAIN}"
        )


def _check_split(steering: Steering, split: str, pairs: int) -> None:
    """Every array has a row per pair, and names clusters and passages that exist."""
    clusters, passages = len(steering.names), len(steering.assignment)
    shape = (pairs, len(VARIANTS), steering.centroids.shape[1])
    limits = {"clusters": (0, clusters), "predicted": (0, clusters), "negatives": (EMPTY, passages)}
    vectors = steering.vectors(split)
    if vectors.shape != shape or vectors.dtype != np.float32:
        raise DataError(
            f"{steering.folder}/steering_{split}.npy: has the shape {vectors.shape}, not {shape}; {AGAIN}"
        )
    for start in range(0, pairs, _CHUNK):
        finite = np.isfinite(vectors[start : start + _CHUNK]).all(axis=(1, 2))
        if not finite.all():
            raise DataError(
                f"{steering.folder}/steering_{split}.npy: row {start + int(np.argmin(finite))} holds NaN or "
                f"Inf; {AGAIN}"
            )
    for what, (low, high) in limits.items():
        values: np.ndarray = getattr(steering, what)(split)
        inside = (
            values.dtype == np.int32 and len(values) == pairs and low <= values.min() <= values.max() < high
        )
        if not inside:
            raise DataError(
                f"{steering.folder}/{what}_{split}.npy: does not hold {pairs} rows of numbers from {low} to "
                f"{high - 1}; {AGAIN}"
            )

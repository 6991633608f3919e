"""Steering for JASPER: clusters of the corpus, vectors that say where to look, and tiers of hard negatives.

    python -m prime_jax.data.steering --data DIR [--encoder minilm] [--clusters 32] [--tiers 3 4 3 2]
        [--keywords 8] [--seed 0] [--out DIR/steering]
    python -m prime_jax.data.steering --data DIR --split-into OUTDIR [--shares 0.8 0.1 0.1]

The second form deals a folder that has only a train.jsonl out to train, dev and test (`split_evenly`). The
first writes a folder of

- `clusters.safetensors`: unit `centroids` of spherical k-means over the corpus, and the `assignment` of each
  passage; `names.json`: name, keywords and size of each cluster;
- `steering_{split}.npy` `[pairs, 4, D]`, a vector for each pair (example, right answer) in each variant:
  - `centroid`, from the question to the centroid of the TARGET's cluster. It leaks the label;
  - `keyword`, the mean embedding of the question's keywords, zero where it has none;
  - `residual`, from the centroid nearest to the question to the question. JASPER takes the target's centroid;
    the question's own leaks nothing;
  - `predicted`, from the question to the centroid of the cluster predicted from the question alone;
- `clusters_{split}.npy`, `predicted_{split}.npy` and `negatives_{split}.npy`: cluster of the right answer,
  the predicted one, and hard negatives (`prime_jax.data.hard_negatives`);
- `manifest.json`.

`prime_jax.data.steered` reads it.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import numpy as np
from jaxtyping import Float32, Int32, Int64
from safetensors.numpy import save_file

from prime_jax import files
from prime_jax._version import __version__
from prime_jax.data.cluster_prediction import CrossFitted, cross_fit, folds_of, predict, share_right
from prime_jax.data.clusters import Clusters, cluster_passages, load_faiss, nearest
from prime_jax.data.embedded import EMPTY, EmbeddedDataset, embed_dataset, gather
from prime_jax.data.encode import MINILM, Encoder, encode_texts, load_encoder
from prime_jax.data.grouping import conversation_labels
from prime_jax.data.hard_negatives import TIERS, tiered_negatives
from prime_jax.data.keywords import Vocabulary, keywords_of, name_clusters
from prime_jax.data.prepare import prepare
from prime_jax.data.records import SPLITS, Dataset, Example
from prime_jax.data.split_evenly import split_evenly, write_splits
from prime_jax.data.steered import KIND, STEERING, VARIANTS, pairs_of
from prime_jax.data.store import EmbeddingStore
from prime_jax.errors import ConfigError, DataError, PredictorError
from prime_jax.manifest import MANIFEST, write_manifest
from prime_jax.nn.encoder_products import EncoderPrecision
from prime_jax.progress import progress
from prime_jax.retrieval.vectors import unit

CLUSTERS, COUNTS, KEYWORDS = 32, (3, 4, 3, 2), 8
NAMED = 10  # keywords of a cluster
ROWS = 2048  # pairs whose vectors are made at a time


def build_steering(
    folder: Path,
    encoder: Encoder,
    *,
    out: Path | None = None,
    clusters: int = CLUSTERS,
    tiers: Sequence[int] = COUNTS,
    keywords: int = KEYWORDS,
    seed: int = 0,
    store_folder: Path | None = None,
    query_prefix: str = "",
    passage_prefix: str = "",
) -> dict[str, Any]:
    """Build the steering of all splits of a data folder; the same arguments give the same bytes.

    Args:
        folder: Data folder in the JSONL contract, with a train.jsonl.
        encoder: Encodes what the store does not hold yet: texts, and the keywords of the questions.
        out: Where to write; None means `steering/` in the data folder. An older one is replaced.
        clusters: C, at least 2.
        tiers: How many hard negatives of each of the four tiers.
        keywords: How many words of a question count at most.
        seed: Of k-means, of the folds and of random negatives.
        store_folder: Where embeddings are kept; None means `embeddings/` in the data folder.
        query_prefix: Put before questions, turns and keywords.
        passage_prefix: Put before passages.

    Returns:
        The facts of its manifest.

    Raises:
        ConfigError: If a count is out of bounds.
        DataError: If the data break the contract, there are too few passages, an embedding is not finite, or
            `out` holds something else.
    """
    out = out or folder / STEERING
    _check(clusters, tiers, keywords)
    _check_free(out)
    prefixes = {"query_prefix": query_prefix, "passage_prefix": passage_prefix}
    dataset, data = _embedded(folder, encoder, store_folder, prefixes)
    if "train" not in dataset.splits:
        raise DataError(f"{folder / 'train.jsonl'}: is missing; clusters are predicted as train has them")
    found = cluster_passages(data.corpus(), clusters, seed=seed)
    texts = [passage.text for passage in dataset.corpus]
    vocabulary = Vocabulary.of(texts)
    fitted, groups = _fit(dataset, data, found, seed)
    facts: dict[str, Any] = {"pairs": {}, "examples": {}, "routing": {}, "negatives_missing": {}}
    with files.atomic_folder(out) as temporary:
        arrays = {"centroids": found.centroids, "assignment": found.assignment}
        save_file(arrays, temporary / "clusters.safetensors")
        (temporary / "clusters.safetensors").chmod(0o644)  # as the other files
        named = name_clusters(texts, found.assignment, vocabulary, NAMED)
        files.write_json(temporary / "names.json", named)
        for split in sorted(dataset.splits, key=SPLITS.index):
            words = _keyword_rows(
                dataset.splits[split], encoder, data.store, vocabulary, keywords, query_prefix
            )
            made = _write_split(temporary, data, split, found, fitted, words, tiers, seed)
            for name, fact in made.items():
                facts[name][split] = fact
        facts |= {
            "encoder": encoder.identity,
            "data_hashes": _hashes(dataset),
            **prefixes,
            "passages": len(texts),
            "clusters": clusters,
            "tiers": list(tiers),
            "keywords": keywords,
            "seed": seed,
            "variants": list(VARIANTS),
            "groups": groups,
            "ridge": fitted.strength,
            "versions": {
                "prime_jax": __version__,
                "numpy": np.__version__,
                "faiss": load_faiss().__version__,
            },
        }
        write_manifest(temporary, KIND, **facts)
    return facts


def _embedded(
    folder: Path, encoder: Encoder, store_folder: Path | None, prefixes: Mapping[str, Any]
) -> tuple[Dataset, EmbeddedDataset]:
    """All splits that exist, with embeddings that were found to be finite."""
    splits = [name for name in SPLITS if (folder / f"{name}.jsonl").exists()]
    dataset, store = prepare(folder, splits, encoder, store_folder=store_folder, **prefixes)
    data = embed_dataset(
        dataset,
        store,
        max_context_length=1,  # turns are not used
        query_prefix=prefixes["query_prefix"],
        passage_prefix=prefixes["passage_prefix"],
    )
    return dataset, data


def _fit(
    dataset: Dataset, data: EmbeddedDataset, clusters: Clusters, seed: int
) -> tuple[CrossFitted, dict[str, int]]:
    """Predict clusters of train by cross-fitting over groups of examples that share a question or a turn."""
    split = data.splits["train"]
    example, target = pairs_of(split)
    groups = conversation_labels(dataset.splits["train"])
    sizes = np.bincount(groups)
    folds = folds_of(groups[example], seed=seed)
    questions = data.store.part(split.query_rows[example])
    fitted = cross_fit(questions, clusters.assignment[target], folds, len(clusters.centroids))
    return fitted, {"count": len(sizes), "largest": int(sizes.max())}


def _write_split(
    folder: Path,
    data: EmbeddedDataset,
    split: str,
    clusters: Clusters,
    fitted: CrossFitted,
    words: Int64[np.ndarray, "n K"],
    tiers: Sequence[int],
    seed: int,
) -> dict[str, Any]:
    """Write the four arrays of a split and say what is in them."""
    part = data.splits[split]
    example, target = pairs_of(part)
    questions = data.store.part(part.query_rows[example])
    actual = clusters.assignment[target]
    predicted = fitted.predicted if split == "train" else predict(fitted.weights, questions)
    near = nearest(questions, clusters.centroids)
    path, shape = folder / f"steering_{split}.npy", (len(target), len(VARIANTS), data.store.dim)
    table = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    with progress(f"steering of {split}", len(target), "pairs") as advance:
        for start in range(0, len(target), ROWS):
            at = slice(start, start + ROWS)
            centroids = (clusters.centroids[some[at]] for some in (actual, near, predicted))
            keyword = gather(data.store, words[example[at]])[0].sum(axis=1)
            table[at] = _variants(unit(questions[at]), keyword, *centroids)
            advance(len(table[at]))
    table.flush()
    del table
    negatives = tiered_negatives(data, split, clusters, tiers, seed=seed)
    for name, array in (("clusters", actual), ("predicted", predicted), ("negatives", negatives)):
        np.save(folder / f"{name}_{split}.npy", array)
    missing = [int((part == EMPTY).sum()) for part in np.split(negatives, np.cumsum(tiers)[:-1], axis=1)]
    largest = np.bincount(clusters.assignment[pairs_of(data.splits["train"])[1]]).argmax()
    return {
        "pairs": len(target),
        "examples": len(part),
        "negatives_missing": dict(zip(TIERS, missing, strict=True)),
        "routing": {
            "predicted": share_right(predicted, actual),
            "nearest_centroid": share_right(near, actual),
            "largest_cluster": share_right(np.full_like(actual, largest), actual),
        },
    }


def _variants(
    question: Float32[np.ndarray, "b D"],
    keyword: Float32[np.ndarray, "b D"],
    actual: Float32[np.ndarray, "b D"],
    near: Float32[np.ndarray, "b D"],
    predicted: Float32[np.ndarray, "b D"],
) -> Float32[np.ndarray, "b 4 D"]:
    """The vectors of some pairs, in the order of `VARIANTS`; the last three are centroids."""
    return unit(np.stack([actual - question, keyword, question - near, predicted - question], axis=1))


def _keyword_rows(
    examples: Sequence[Example],
    encoder: Encoder,
    store: EmbeddingStore,
    vocabulary: Vocabulary,
    most: int,
    prefix: str,
) -> Int64[np.ndarray, "n K"]:
    """Store rows of the keywords of each example's question, then -1; encodes those that are missing."""
    chosen = [keywords_of(example.query, vocabulary, most) for example in examples]
    distinct = sorted({word for words in chosen for word in words})
    encode_texts([prefix + word for word in distinct], encoder, store, title="encoding keywords")
    row_of = dict(zip(distinct, store.rows([prefix + word for word in distinct]).tolist(), strict=True))
    table = np.full((len(examples), most), EMPTY, np.int64)
    for number, words in enumerate(chosen):
        table[number, : len(words)] = [row_of[word] for word in words]
    return table


def _hashes(dataset: Dataset) -> dict[str, str]:
    """`Dataset.hash` of every choice of splits, as whoever loads only some of them sees it."""
    names = sorted(dataset.splits)
    choices = [some for count in range(1, len(names) + 1) for some in combinations(names, count)]
    return {
        "+".join(some): replace(dataset, splits={name: dataset.splits[name] for name in some}).hash
        for some in choices
    }


def _check(clusters: int, tiers: Sequence[int], keywords: int) -> None:
    if clusters < 2:
        raise ConfigError(f"--clusters is {clusters}, it must be at least 2")
    if len(tiers) != len(TIERS) or min(tiers) < 0 or not sum(tiers):
        raise ConfigError(f"--tiers is {list(tiers)}, it must be four counts that are not all zero")
    if keywords < 1:
        raise ConfigError(f"--keywords is {keywords}, it must be at least 1")


def _check_free(out: Path) -> None:
    """Refuse to replace anything but an older folder of steering."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    manifest = files.read_json(out / MANIFEST, DataError) if (out / MANIFEST).is_file() else None
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise DataError(f"{out}: is there already and is no steering; remove it or name another --out")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this module; see its first lines.

    Returns:
        0 when it is written, 2 after a mistake of the user, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="python -m prime_jax.data.steering",
        description="Build clusters, steering and hard negatives for JASPER, or deal out a train split.",
    )
    parser.add_argument(
        "--data", type=files.user_path, required=True, help="data folder with corpus.jsonl and splits"
    )
    parser.add_argument(
        "--encoder", default=MINILM, help="minilm, a model folder, or package.module:attribute"
    )
    parser.add_argument(
        "--precision", choices=get_args(EncoderPrecision), default="float32", help="of the encoder's products"
    )
    parser.add_argument("--clusters", type=int, default=CLUSTERS)
    parser.add_argument(
        "--tiers", type=int, nargs=4, default=COUNTS, metavar="N", help="hard negatives: " + ", ".join(TIERS)
    )
    parser.add_argument(
        "--keywords", type=int, default=KEYWORDS, help="words of a question that count at most"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=files.user_path, help="default: DIR/steering")
    parser.add_argument(
        "--store", type=files.user_path, help="root folder of stores; default: DIR/embeddings"
    )
    parser.add_argument("--query-prefix", default="", help="put before queries and turns (E5, BGE)")
    parser.add_argument("--passage-prefix", default="", help="put before passages (E5)")
    parser.add_argument(
        "--split-into", type=files.user_path, metavar="OUTDIR", help="write train, dev and test there"
    )
    parser.add_argument(
        "--shares", type=float, nargs=3, default=(0.8, 0.1, 0.1), metavar="S", help="of these"
    )
    options = parser.parse_args(argv)
    try:
        lines = _split(options) if options.split_into else _build(options)
        for line in lines:
            print(line)
    except (PredictorError, OSError) as mistake:
        print(f"prime-jax steering: {mistake}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prime-jax steering: stopped by Ctrl-C; nothing was written", file=sys.stderr)
        return 130
    return 0


def _build(options: argparse.Namespace) -> Iterator[str]:
    started = time.perf_counter()
    facts = build_steering(
        options.data,
        load_encoder(options.encoder, options.precision),
        out=options.out,
        clusters=options.clusters,
        tiers=options.tiers,
        keywords=options.keywords,
        seed=options.seed,
        store_folder=options.store,
        query_prefix=options.query_prefix,
        passage_prefix=options.passage_prefix,
    )
    yield f"clusters   {facts['clusters']} of {facts['passages']:,} passages"
    for split, pairs in facts["pairs"].items():
        routing, missing = facts["routing"][split], sum(facts["negatives_missing"][split].values())
        yield (
            f"{split:<10} {pairs:,} pairs; cluster predicted right {routing['predicted']:.3f}, by nearest "
            f"centroid {routing['nearest_centroid']:.3f}; negatives missing {missing:,}"
        )
    yield f"seconds    {time.perf_counter() - started:.1f}"
    yield f"written    {options.out or options.data / STEERING}"


def _split(options: argparse.Namespace) -> Iterator[str]:
    for name in ("dev", "test"):
        if (options.data / f"{name}.jsonl").exists():
            raise DataError(f"{options.data / name}.jsonl: is there already; only a train.jsonl is dealt out")
    prefixes = {"query_prefix": options.query_prefix, "passage_prefix": options.passage_prefix}
    _check(options.clusters, options.tiers, options.keywords)
    dataset, data = _embedded(
        options.data, load_encoder(options.encoder, options.precision), options.store, prefixes
    )
    found = cluster_passages(data.corpus(), options.clusters, seed=options.seed)
    labels: Int32[np.ndarray, " n"] = found.assignment[[ids[0] for ids in data.splits["train"].positives]]
    split = split_evenly(dataset.splits["train"], labels, options.shares, seed=options.seed)
    write_splits(options.split_into, options.data, replace(dataset, splits=split))
    for name, examples in split.items():
        yield f"{name:<10} {len(examples):,} examples"
    yield f"written    {options.split_into}"


if __name__ == "__main__":
    sys.exit(main())

"""A memory store that searches with predictions: a bundle, a data folder, Qdrant. No JAX.

    python export/mcs_search.py BUNDLE DATA                        # embedded Qdrant, in memory
    python export/mcs_search.py BUNDLE DATA --path memory/         # embedded, kept on disk
    python export/mcs_search.py BUNDLE DATA --url http://host:6333 # a server or a cluster, the same code

Writes every passage of DATA as a memory, then asks the questions of a split twice, with the plain query and
with the predicted embedding, and shows what each finds. DATA is in the JSONL contract with its embeddings
beside it (`prime-jax encode`); in production they come from your encoder.
"""

import json
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from bundle_files import (
    BundleError,
    checked,
    config_of_embeddings,
    file_sha256,
    onnx_file,
    read_safetensors,
    torch_runtime,
    verify,
)
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ApiException

TOP = 10
BATCH = 64
SHOWN = 3


class Question(NamedTuple):
    """One row of the split: `context` holds the newest turns, oldest first."""

    context: list[str]
    query: str
    positives: set[int]
    exclude: list[int]
    scope: str | None


class Embeddings:
    """The store that `prime-jax encode` wrote, read by text."""

    def __init__(self, folder: Path, encoder: str):
        home = folder / re.sub(r"[^A-Za-z0-9._-]+", "-", encoder).strip(".-")
        if not (home / "index.json").is_file():
            raise BundleError(
                f"{home}: no embeddings of {encoder}; run: prime-jax encode --data {folder.parent}"
            )
        try:
            shards = json.loads((home / "index.json").read_text("utf-8"))["shards"]
            parts = [read_shard(home, shard["file"], shard["sha256"]) for shard in shards]
        except (ValueError, KeyError, TypeError) as broken:
            raise BundleError(f"{home / 'index.json'}: not the index of a store ({broken!r})") from None
        if not parts:
            raise BundleError(f"{home}: holds no embeddings; run: prime-jax encode --data {folder.parent}")
        self.vectors = np.concatenate([vectors for vectors, _ in parts])
        keys = np.concatenate([keys for _, keys in parts])
        self.row = {key.tobytes(): row for row, key in enumerate(keys)}

    def of(self, texts: list[str]) -> Any:
        """Embeddings, `[n, D]`."""
        if not texts:
            return self.vectors[:0]
        try:
            return self.vectors[[self.row[sha256(text.encode()).digest()[:16]] for text in texts]]
        except KeyError:
            raise BundleError("the store lacks the embedding of a text; run prime-jax encode again") from None


def read_shard(home: Path, name: str, digest: str) -> tuple[Any, Any]:
    """Embeddings `[n, D]`, float32, and keys `[n, 16]` of one file of a store.

    Raises:
        BundleError: If it lies elsewhere, is missing or not as the index says, or holds NaN or Inf.
    """
    file = home / name
    if not re.fullmatch(r"shard-\d{5,}\.safetensors", name):
        raise BundleError(f"{home / 'index.json'}: {name!r} is no shard of this store")
    if not file.is_file() or file_sha256(file) != digest:
        raise BundleError(f"{file}: missing or damaged, its SHA-256 is not that of index.json")
    shard = read_safetensors(file)
    wrong = np.flatnonzero(~np.isfinite(shard["embeddings"]).all(axis=1))
    if wrong.size:
        raise BundleError(f"{file}: row {wrong[0]} holds NaN or Inf")
    return shard["embeddings"].astype(np.float32, copy=False), shard["keys"]


def onnx_predictor(bundle: Path, manifest: dict[str, Any], precision: str) -> Any:
    """A function from context, mask and query to embeddings, through ONNX Runtime."""
    import onnxruntime

    file = onnx_file(bundle, manifest, precision)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def predict(context: Any, mask: Any, query: Any) -> Any:
        return session.run(["embedding"], {"context": context, "context_mask": mask, "query": query})[0]

    return predict


def torch_predictor(bundle: Path) -> Any:
    """The same through PyTorch, with the bundle's own module."""
    import torch

    model = torch_runtime(bundle).load_bundle(bundle)

    def predict(context: Any, mask: Any, query: Any) -> Any:
        with torch.inference_mode():
            return model(*map(torch.from_numpy, (context, query, mask))).numpy()

    return predict


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


def remember(client: QdrantClient, name: str, memories: list[dict[str, Any]], vectors: Any) -> None:
    """Write every memory with its text; ids are line numbers, so writing them again changes nothing.

    A collection that holds anything else is left alone.
    """
    size = vectors.shape[1]
    if client.collection_exists(name):
        ids = range(len(memories))
        there = [
            point
            for start in range(0, len(memories), 1000)
            for point in client.retrieve(name, list(ids[start : start + 1000]))
        ]
        same = all(memories[int(point.id)] == point.payload for point in there)
        if not same or client.count(name).count != len(there):
            raise BundleError(
                f"the collection {name!r} holds other memories; name another one with --collection"
            )
    else:
        params = models.VectorParams(size=size, distance=models.Distance.COSINE)
        client.create_collection(name, vectors_config=params)
    for start in range(0, len(memories), 1000):
        points = [
            models.PointStruct(id=start + row, vector=vector.tolist(), payload=memories[start + row])
            for row, vector in enumerate(vectors[start : start + 1000])
        ]
        client.upsert(name, points, wait=True)


def allowed(question: Question, scoped: bool) -> models.Filter:
    """Memories that were not seen yet, of the same scope where the memory has scopes at all."""
    same: list[Any] = []
    if scoped and question.scope is None:
        same = [models.IsNullCondition(is_null=models.PayloadField(key="scope"))]
    elif question.scope is not None:
        same = [models.FieldCondition(key="scope", match=models.MatchValue(value=question.scope))]
    seen: list[Any] = [models.HasIdCondition(has_id=list(question.exclude))] if question.exclude else []
    return models.Filter(must=same, must_not=seen)


def search(
    client: QdrantClient, name: str, questions: list[Question], vectors: Any, scoped: bool
) -> list[list[tuple[int, float]]]:
    """Id and score of the nearest memories of each question, best first."""
    found = []
    for start in range(0, len(questions), BATCH):
        requests = [
            models.QueryRequest(query=vector.tolist(), limit=TOP, filter=allowed(question, scoped))
            for question, vector in zip(
                questions[start : start + BATCH], vectors[start : start + BATCH], strict=True
            )
        ]
        answers = client.query_batch_points(name, requests)
        found += [[(int(point.id), point.score) for point in answer.points] for answer in answers]
    return found


def equals_exact_search(
    found: list[tuple[int, float]],
    question: Question,
    vector: Any,
    vectors: Any,
    memories: list[dict[str, Any]],
) -> bool:
    """Whether these are the nearest allowed memories, by comparing with all of them; ties in any order."""
    scores = vectors @ (vector / np.linalg.norm(vector)) / np.linalg.norm(vectors, axis=1)
    closed = np.array([memory["scope"] != question.scope for memory in memories])
    closed[question.exclude] = True
    best = np.sort(np.where(closed, -np.inf, scores))[::-1][: len(found)]
    ids = [row for row, _ in found]
    return (
        len(found) == min(TOP, int((~closed).sum()))
        and not closed[ids].any()
        and bool(np.allclose(scores[ids], best, atol=1e-5))
    )


def predict_all(
    predict: Any, config: dict[str, Any], questions: list[Question], embeddings: Embeddings
) -> Any:
    """Predicted embeddings of all questions, `[Q, E]`; slots without a turn are masked."""
    _, slots, size = config["inputs"]["context"]["shape"]
    prefix, found = config.get("query_prefix", ""), []
    for start in range(0, len(questions), BATCH):
        rows = questions[start : start + BATCH]
        context = np.zeros((len(rows), slots, size), np.float32)
        mask = np.zeros((len(rows), slots), bool)
        for row, question in enumerate(rows):
            turns = question.context[-slots:]
            if turns:
                context[row, : len(turns)] = embeddings.of([prefix + turn for turn in turns])
                mask[row, : len(turns)] = True
        query = embeddings.of([prefix + question.query for question in rows])
        found.append(checked(predict(context, mask, query)))
    return (
        np.concatenate(found)
        if found
        else np.zeros((0, config["output"]["embedding"]["shape"][1]), np.float32)
    )


def mapped(bundle: Path, vectors: Any) -> Any:
    """Passages as predictions search them: through the bundle's target head, where it has one."""
    if not (bundle / "target_head.safetensors").is_file():
        return vectors
    moved = vectors + vectors @ read_safetensors(bundle / "target_head.safetensors")["kernel"]
    return moved / np.linalg.norm(moved, axis=1, keepdims=True)


def report(
    ways: dict[str, list[list[tuple[int, float]]]], questions: list[Question], memories: list[dict[str, Any]]
) -> None:
    """How often each way finds a right memory, and the same questions side by side."""
    ranks = {
        name: [
            next((rank for rank, (row, _) in enumerate(one, 1) if row in question.positives), None)
            for one, question in zip(found, questions, strict=True)
        ]
        for name, found in ways.items()
    }
    print(f"\n{'searched with':<16}{'first':>8}{'in ' + str(TOP):>8}{'MRR@' + str(TOP):>9}")
    for name, hits in ranks.items():
        known = [rank for rank in hits if rank]
        shares = (sum(rank == 1 for rank in known), len(known), sum(1 / rank for rank in known))
        first, within, mrr = (share / len(questions) for share in shares)
        print(f"{name:<16}{first:>8.1%}{within:>8.1%}{mrr:>9.3f}")
    better = [
        row for row in range(len(questions)) if ranks["prediction"][row] == 1 and ranks["query"][row] != 1
    ]
    for row in better[:SHOWN]:
        print(f"\nquestion    {_short(questions[row].query)}")
        for name, found in ways.items():
            mark = "right" if ranks[name][row] == 1 else "wrong"
            print(f"{name:<12}{_short(memories[found[row][0][0]]['text'])}  ({mark})")


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def run(given: Namespace) -> None:
    """Write the memories, ask the questions, compare."""
    manifest = verify(given.bundle)
    config = config_of_embeddings(given.bundle)
    if config["model"].get("kind", "prime") != "prime":
        raise BundleError(
            f"{given.bundle}: its model takes a steering vector in place of turns; this script gives it turns"
        )
    if config.get("context_from") == "search":
        raise BundleError(
            f"{given.bundle}: takes the passages of a first search as turns; this script takes the data's"
        )
    if "encoder" not in config:
        raise BundleError(f"{given.bundle / 'config.json'}: does not name the encoder")
    embeddings = Embeddings(given.store or given.data / "embeddings", config["encoder"])
    passages = list(read_lines(given.data / "corpus.jsonl"))
    if not passages:
        raise BundleError(f"{given.data / 'corpus.jsonl'}: holds no passage")
    memories = [{"id": row["id"], "text": row["text"], "scope": row.get("scope")} for row in passages]
    index = {memory["id"]: row for row, memory in enumerate(memories)}
    vectors = embeddings.of([config.get("passage_prefix", "") + memory["text"] for memory in memories])
    questions = [
        Question(
            row["context"],
            row["query"],
            {index[name] for name in row["positives"]},
            [index[name] for name in row.get("exclude", ())],
            row.get("scope"),
        )
        for row in read_lines(given.data / f"{given.split}.jsonl")
    ][: given.questions]
    if not questions:
        raise BundleError(f"{given.data / given.split}.jsonl: holds no question")

    client = QdrantClient(
        **{"url": given.url}
        if given.url
        else {"path": given.path}
        if given.path
        else {"location": ":memory:"}
    )
    searched = {"query": vectors, "prediction": mapped(given.bundle, vectors)}
    names = {"query": given.collection, "prediction": given.collection}
    if searched["prediction"] is not vectors:  # a target head moves the memory: it needs its own collection
        names["prediction"] += "_mapped"
    for way, name in dict(zip(names.values(), names, strict=True)).items():
        remember(client, way, memories, searched[name])
    print(f"memories: {len(memories):,} in {given.url or given.path or 'an embedded store'}")

    predict = (
        torch_predictor(given.bundle)
        if given.runtime == "torch"
        else onnx_predictor(given.bundle, manifest, given.precision)
    )
    prefix = config.get("query_prefix", "")
    asked = {
        "query": embeddings.of([prefix + question.query for question in questions]),
        "prediction": predict_all(predict, config, questions, embeddings),
    }
    scoped = any(memory["scope"] is not None for memory in memories)
    ways = {name: search(client, names[name], questions, asked[name], scoped) for name in asked}
    exact = [
        equals_exact_search(found, question, vector, searched[name], memories)
        for name in ways
        for found, question, vector in zip(ways[name], questions, asked[name], strict=True)
    ]
    print(f"questions: {len(questions):,}; {sum(exact):,} of {len(exact):,} answers equal an exact search")
    report(ways, questions, memories)
    client.close()


def main() -> None:
    """Read the arguments and run."""
    parser = ArgumentParser(description="Search a Qdrant memory with predicted embeddings, without JAX.")
    parser.add_argument("bundle", type=Path, help="bundle of prime-jax export")
    parser.add_argument("data", type=Path, help="data folder: corpus.jsonl, a split, embeddings/")
    parser.add_argument("--store", type=Path, metavar="DIR", help="embeddings (default: DATA/embeddings)")
    parser.add_argument("--split", default="test", help="whose questions are asked (default: test)")
    parser.add_argument("--questions", type=int, default=500, metavar="N", help="at most (default: 500)")
    parser.add_argument("--url", help="Qdrant server; without it, a store in this process")
    parser.add_argument("--path", metavar="DIR", help="where the embedded store is kept (default: memory)")
    parser.add_argument("--collection", default="memories", help="its name there (default: memories)")
    parser.add_argument("--runtime", choices=["onnx", "torch"], default="onnx")
    parser.add_argument("--precision", choices=["fp32", "fp16", "int8"], default="fp32")
    given = parser.parse_args()
    if given.questions < 1:
        parser.error("--questions must be 1 or more")
    try:
        run(given)
    except (BundleError, OSError, KeyError, ValueError, ApiException) as mistake:
        told = f"the key {mistake} is missing" if isinstance(mistake, KeyError) else mistake
        print(f"mcs_search: {told}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

"""The memory store that searches with predictions: ten thousand memories, no JAX, as an exact search."""

import importlib
import json
import os
import re
import shutil
import uuid
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import fakes
import numpy as np
import pytest
from consumers import SCRIPTS, consume
from predictors import make
from safetensors.numpy import load_file, save_file

import prime_jax
from prime_jax.data.prepare import prepare
from prime_jax.data.store import EmbeddingStore
from prime_jax.export.bundle import write_bundle
from prime_jax.files import write_text
from prime_jax.retrieval.topk import search

QUESTIONS = 60


class Setup(NamedTuple):
    """A bundle, and a data folder with its embeddings."""

    bundle: Path
    data: Path


def make_setup(folder: Path, chats: int) -> Setup:
    """Six memories for each chat."""
    fakes.write_conversations(folder / "data", chats=chats)
    prepare(folder / "data", ("train", "dev", "test"), fakes.encoder())
    facts = {"encoder": fakes.encoder().identity, "query_prefix": "", "passage_prefix": ""}
    write_bundle(make(residual="copy", use_torch_compile=False), folder / "bundle", facts=facts)
    return Setup(folder / "bundle", folder / "data")


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return make_setup(tmp_path_factory.mktemp("mcs"), 1667)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return make_setup(tmp_path_factory.mktemp("small"), 60)


def expected_hits(setup: Setup) -> dict[str, float]:
    """Share of right answers among the first ten, by the library's own search."""
    dataset, store = prepare(setup.data, ("test",), fakes.encoder())
    examples = dataset.splits["test"][:QUESTIONS]
    index = {passage.id: row for row, passage in enumerate(dataset.corpus)}
    corpus = store[store.rows([passage.text for passage in dataset.corpus])]
    query = store[store.rows([example.query for example in examples])]
    context, mask = np.zeros((len(examples), 4, fakes.DIM), np.float32), np.zeros((len(examples), 4), bool)
    for row, example in enumerate(examples):
        if turns := list(example.context[-4:]):
            context[row, : len(turns)], mask[row, : len(turns)] = store[store.rows(turns)], True
    predicted = prime_jax.load(setup.bundle, precision="float32").predict(context, query, mask)
    exclude = [np.array([index[name] for name in example.exclude], np.int64) for example in examples]
    hits = {}
    for name, vectors in (("query", query), ("prediction", predicted)):
        _, found = search(vectors, corpus, 10, exclude=exclude)
        right = [index[example.positives[0]] for example in examples]
        hits[name] = float(np.mean([one in row for one, row in zip(right, found, strict=True)]))
    return hits


@pytest.mark.parametrize("runtime", ["onnx", "torch"])
def test_finds_what_an_exact_search_finds(setup: Setup, runtime: str) -> None:
    done = consume("mcs_search.py", *map(str, setup), "--questions", f"{QUESTIONS}", "--runtime", runtime)
    assert done.returncode == 0, done.stderr
    assert "memories: 10,002 in an embedded store" in done.stdout
    answers = 2 * QUESTIONS
    assert f"questions: {QUESTIONS}; {answers} of {answers} answers equal an exact search" in done.stdout
    for name, share in expected_hits(setup).items():
        (shown,) = re.findall(rf"^{name} +\S+ +(\S+)%", done.stdout, re.MULTILINE)
        assert float(shown) == pytest.approx(100 * share, abs=0.06)


def test_a_store_on_disk_may_be_written_again(small: Setup, tmp_path: Path) -> None:
    words = [*map(str, small), "--questions", "5", "--path", str(tmp_path / "memory")]
    first = consume("mcs_search.py", *words)
    assert first.returncode == 0, first.stderr
    again = consume("mcs_search.py", *words)
    assert again.stdout == first.stdout


def test_other_memories_are_left_alone(small: Setup, tmp_path: Path) -> None:
    words = ["--questions", "5", "--path", str(tmp_path / "memory")]
    assert consume("mcs_search.py", *map(str, small), *words).returncode == 0
    data = Path(shutil.copytree(small.data, tmp_path / "data"))
    lines = (data / "corpus.jsonl").read_text().splitlines(keepends=True)
    first, other = json.loads(lines[0]), json.loads(lines[1])
    lines[0] = json.dumps(first | {"text": other["text"]}) + "\n"
    (data / "corpus.jsonl").write_text("".join(lines))
    done = consume("mcs_search.py", str(small.bundle), str(data), *words)
    assert done.returncode == 2
    assert "the collection 'memories' holds other memories" in done.stderr


@pytest.mark.skipif("QDRANT_URL" not in os.environ, reason="QDRANT_URL names no server")
def test_a_real_server(setup: Setup) -> None:
    words = ["--questions", "20", "--url", os.environ["QDRANT_URL"], "--collection", uuid.uuid4().hex]
    done = consume("mcs_search.py", *map(str, setup), *words)
    assert done.returncode == 0, done.stderr


def test_scopes_keep_memories_apart(small: Setup, tmp_path: Path) -> None:
    """Every chat its own scope: only its own turns can be found."""
    data = Path(shutil.copytree(small.data, tmp_path / "data"))
    for name in ("corpus", "test"):
        rows = [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
        for row in rows:
            row["scope"] = row["id"].removeprefix("p").split("-")[0]
        write_text(data / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    done = consume("mcs_search.py", str(small.bundle), str(data), "--questions", "10")
    assert done.returncode == 0, done.stderr
    assert "20 of 20 answers equal an exact search" in done.stdout
    assert re.search(r"^prediction +\S+ +100.0%", done.stdout, re.MULTILINE)


SHARD = "shard-00000.safetensors"


def spoil(store: Path, kind: str) -> None:
    """Change a shard, or what the index says of it."""
    index = json.loads((store / "index.json").read_text())
    (facts,) = index["shards"]
    if kind == "byte":
        whole = bytearray((store / SHARD).read_bytes())
        whole[-1] ^= 1
        (store / SHARD).write_bytes(whole)
    elif kind == "nan":
        arrays = load_file(store / SHARD)
        arrays["embeddings"][1, 2] = np.nan
        save_file(arrays, store / SHARD)
        facts["sha256"] = sha256((store / SHARD).read_bytes()).hexdigest()
    elif kind == "path":
        shutil.copy(store / SHARD, store.parent.parent / SHARD)
        facts["file"] = f"../../{SHARD}"
    else:
        del facts["sha256"]
    write_text(store / "index.json", json.dumps(index))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("byte", r"shard-00000\.safetensors: missing or damaged"),
        ("nan", r"shard-00000\.safetensors: row 1 holds NaN or Inf"),
        ("path", r"index\.json: '\.\./\.\./shard-00000\.safetensors' is no shard of this store"),
        ("index", r"index\.json: not the index of a store \(KeyError\('sha256'\)\)"),
    ],
)
def test_embeddings_are_those_that_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, message: str
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    read = importlib.import_module("mcs_search").Embeddings
    texts = ["one", "two", "one two"]
    for dtype in ("float16", "float32"):
        store = EmbeddingStore.open(tmp_path / dtype, fakes.encoder().identity, fakes.DIM, dtype)
        store.add(texts, fakes.encoder().encode(texts))
        found = read(tmp_path / dtype, fakes.encoder().identity).of(texts[::-1])
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, store[store.rows(texts[::-1])])
    spoil(store.folder, kind)
    with pytest.raises(Exception, match=message):
        read(tmp_path / "float32", fakes.encoder().identity)


def test_what_is_missing_or_damaged_is_named(small: Setup, tmp_path: Path) -> None:
    done = consume("mcs_search.py", *map(str, small), "--store", str(tmp_path))
    assert done.returncode == 2
    assert "no embeddings of bag-of-words; run: prime-jax encode" in done.stderr
    done = consume("mcs_search.py", *map(str, small), "--split", "nope")
    assert (done.returncode, "nope.jsonl" in done.stderr, "Traceback" in done.stderr) == (2, True, False)
    assert consume("mcs_search.py", *map(str, small), "--questions", "0").returncode == 2
    done = consume("mcs_search.py", *map(str, small), "--url", "http://127.0.0.1:9")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    done = consume("mcs_search.py", *map(str, small), "--precision", "int8")
    assert "has no int8 file; export it with --precision int8" in done.stderr
    bundle = Path(shutil.copytree(small.bundle, tmp_path / "bundle"))
    (bundle / "model.onnx").write_bytes((bundle / "model.onnx").read_bytes()[:-1] + b"\x01")
    done = consume("mcs_search.py", str(bundle), str(small.data))
    assert "model.onnx: missing or damaged" in done.stderr

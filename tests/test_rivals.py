"""The table of rivals: what each row searches with, going on after a stop, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bert import HIDDEN, WORDS, tensors, write_folder

from benchmarks import rivals
from benchmarks.common import with_defaults
from benchmarks.rivals_methods import open_task
from benchmarks.rivals_table import mean_figures
from prime_jax.config import Config, read_config
from prime_jax.data.records import Dataset, Example, Passage, write_dataset
from prime_jax.errors import PredictorError
from prime_jax.pretrained.bert import BertTextEncoder
from prime_jax.retrieval.metrics import ranking_metrics

RIVALS = ["query", "recency_mix", "last_turn_concat", "ridge", "ridge_context"]
TEXTS = ["conversation_text", "conversation_text_and_query"]
CONFIG = f"""
model: {{input_dim: {HIDDEN}, output_dim: {HIDDEN}, hidden_dim: 128, num_layers: 1, num_heads: 4,
  max_context_length: 2, use_torch_compile: false}}
mesh: {{data: 1}}
train: {{batch_size: 8, num_epochs: 1, warmup_steps: 1, gradient_checkpointing: false, mixed_precision: false,
  positives: all, negatives: corpus}}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations that ask for the passage which their first turn says; half of dev's are unseen."""
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("rivals") / "data"

    def words(count: int) -> str:
        return " ".join(random.choice(WORDS, count))

    corpus = [Passage(f"p{row}", words(5)) for row in range(40)]
    splits = {"train": range(24), "dev": range(12, 36)}

    def example(split: str, row: int) -> Example:
        turns = (corpus[row].text, words(4), words(3))[: 1 + row % 3]
        extra = {"rewrite": corpus[row].text} if split == "dev" and row % 2 else {}
        return Example(f"{split}{row}", turns, words(3), (f"p{row}",), extra=extra)

    rows = {split: tuple(example(split, row) for row in numbers) for split, numbers in splits.items()}
    write_dataset(folder, Dataset(tuple(corpus), rows))
    return folder


@pytest.fixture(scope="module")
def command(data: Path) -> list[str]:
    """The options that every call of these tests has."""
    config = data.parent / "small.yaml"
    config.write_text(CONFIG)
    encoder = write_folder(data.parent / "encoder", tensors())
    return [
        *("--data", str(data), "--split", "dev", "--config", str(config)),
        *(f"--data.encoder={encoder}", "--seeds", "0"),
    ]


@pytest.fixture(scope="module")
def table(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a run of all rows but those of sentence-transformers."""
    out = tmp_path_factory.mktemp("table") / "table.json"
    rivals.main([*command, "--out", str(out), "--only", *RIVALS, *TEXTS, "rewrite", "small"])
    return out


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_every_row_searches_with_what_it_says(table: Path, data: Path, command: list[str]) -> None:
    options = [f"--data.path={data}", command[6]]
    task = open_task(read_config(data.parent / "small.yaml", options), "dev")
    encoder = BertTextEncoder(data.parent / "encoder")
    passages = encoder.encode([passage.text for passage in task.dataset.corpus])
    right = [np.array([row]) for row in range(12, 36)]
    dev = task.dataset.splits["dev"]

    def searched(texts: list[str], *others: list[str]) -> np.ndarray:
        """P@5 to nDCG@10 of the mean of some texts' embeddings, by brute force."""
        vectors = sum((encoder.encode(more) for more in others), encoder.encode(texts))
        found = np.argsort(-vectors @ passages.T, axis=1)[:, :10]
        return np.array([ranking_metrics(found, right)[name].mean() for name in ("P@5", "R@10", "MRR@10")])

    queries = [one.query for one in dev]
    whole = ["\n".join([one.query, *one.context[::-1]]) for one in dev]
    expected = {
        "query": searched(queries),
        "last_turn_concat": searched([f"{one.context[-1]} {one.query}" for one in dev]),
        "conversation_text": searched(whole),
        "conversation_text_and_query": searched(whole, queries),
        "rewrite": searched([one.extra.get("rewrite", one.query) for one in dev]),
    }
    assert not np.allclose(expected["query"], expected["conversation_text"])
    rows = read(table)["table"]
    for name, figures in expected.items():
        mean = [rows[name]["mean"][metric] for metric in ("P@5", "R@10", "MRR@10")]
        np.testing.assert_allclose(mean, figures, atol=1e-9, err_msg=name)


def test_the_table_holds_intervals_costs_and_comparisons(table: Path) -> None:
    found = read(table)
    assert (found["queries"], found["unseen"], found["passages"]) == (24, 12, 40)
    assert list(found["table"]) == [*RIVALS, *TEXTS, "rewrite", "small"]
    assert found["ours"] == ["small"]
    for row in found["table"].values():
        low, high = row["interval"]["unseen MRR@10"]
        assert 0 <= low <= row["mean"]["unseen MRR@10"] <= high <= 1
        assert not row["index_anew"]
        assert row["ms"] is None or row["ms"] > 0
    costs = found["table"]
    weights = (HIDDEN + 1) * HIDDEN * 4 / 1e6
    assert costs["ridge"]["mb"] - costs["query"]["mb"] == pytest.approx(weights)
    parameters = found["cells"]["small"]["0"]["about"]["parameters"]
    assert costs["small"]["mb"] - costs["query"]["mb"] == pytest.approx(parameters * 4 / 1e6)
    assert costs["small"]["train_seconds"] > 0
    assert costs["query"]["train_seconds"] == 0
    for rival in [*RIVALS, *TEXTS, "rewrite"]:
        compared = found["against"]["small"][rival]["unseen MRR@10"]
        ours, theirs = (costs[name]["mean"]["unseen MRR@10"] for name in ("small", rival))
        assert compared["difference"] == pytest.approx(ours - theirs)


def test_a_row_of_several_seeds_is_their_mean(table: Path, data: Path, command: list[str]) -> None:
    cell = read(table)["cells"]["query"]["any"]
    nothing = {**cell, "found": ["" for _ in cell["found"]]}
    task = open_task(read_config(data.parent / "small.yaml", [f"--data.path={data}", command[6]]), "dev")
    both = mean_figures({"0": cell, "1": nothing}, task.data)
    one = mean_figures({"0": cell}, task.data)
    np.testing.assert_allclose(both["MRR@10"], one["MRR@10"] / 2)
    assert one["MRR@10"].any()


def test_a_finished_cell_is_not_repeated(
    table: Path, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, before = tmp_path / "table.json", read(table)
    known = {name: before["cells"][name] for name in ("query", "ridge")}
    out.write_text(json.dumps({**before, "cells": known}))

    def stopped(*_: object) -> None:
        raise PredictorError("stopped")

    monkeypatch.setattr(rivals, "ours", stopped)
    with pytest.raises(SystemExit):
        rivals.main([*command, "--out", str(out), "--only", "query", "recency_mix", "small"])
    after = read(out)["cells"]
    assert {name: after[name] for name in known} == known  # times of another run would differ
    assert after["recency_mix"]["any"]["found"] == before["cells"]["recency_mix"]["any"]["found"]
    assert "small" not in after


def test_other_settings_and_unknown_rows_are_refused(
    table: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    content = table.read_bytes()

    def refused(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            rivals.main([*command, "--out", str(table), *words])
        assert ended.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    changed = refused("--only", "small", "--train.learning-rate=0.5")
    assert "small, seed 0, was made with other settings (train.learning_rate 0.0001, now 0.5)" in changed
    assert "small, seed 0, was made" in refused(
        "--only", "small", "--train.learning-rate=0.5", "--seeds", "1"
    )
    assert "query_prefix '', now 'x:'" in refused("--only", "query", "--data.query-prefix=x:")
    assert "--only qery: there is no such row; there are query, recency_mix" in refused("--only", "qery")
    assert table.read_bytes() == content


def test_a_setting_that_came_later_leaves_results_good() -> None:
    now = Config().model_dump(mode="json")
    before = json.loads(json.dumps(now))
    del before["train"]["blend_with_start"]
    assert with_defaults(before, None) == now
    assert with_defaults({**before, "train": {"gone": 1}}, None) == {**before, "train": {"gone": 1}}


def test_without_sentence_transformers_it_says_what_to_install(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rivals, "find_spec", lambda name: None)
    for only in ([], ["--only", "sentence_transformers_query"]):
        with pytest.raises(SystemExit):
            rivals.main([*command, "--out", str(tmp_path / "table.json"), *only])
        said = capsys.readouterr().err.splitlines()[-1]
        assert 'pip install "sentence-transformers[train]" torch==2.13.0' in said
        assert ("--only" in said) == (not only)


def test_sentence_transformers_trains_the_query_side_and_both(command: list[str], tmp_path: Path) -> None:
    for package in ("sentence_transformers", "datasets", "accelerate"):
        pytest.importorskip(package)
    out = tmp_path / "table.json"
    names = ["sentence_transformers_query", "sentence_transformers_both"]
    options = ["--epochs", "2", "--learning-rate", "1e-3"]
    rivals.main([*command, "--out", str(out), *options, "--only", "conversation_text", *names])
    rows, cells = read(out)["table"], read(out)["cells"]
    for name in names:
        about = cells[name]["0"]["about"]
        assert about["best_epoch"] == 1 + int(np.argmax(about["dev_MRR@10"]))
        # The split that is measured is dev, so the chosen weights must give the figure they were chosen by.
        assert rows[name]["mean"]["MRR@10"] == pytest.approx(max(about["dev_MRR@10"]))
    assert [rows[name]["index_anew"] for name in names] == [False, True]
    assert rows[names[0]]["mean"]["MRR@10"] > rows["conversation_text"]["mean"]["MRR@10"]


def test_the_loss_is_that_of_our_predictors() -> None:
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("datasets")
    import jax.numpy as jnp
    import torch

    from benchmarks.rivals_sentence_transformers import CorpusSoftmaxLoss
    from prime_jax.losses.corpus import corpus_info_nce, in_chunks
    from prime_jax.types import Batch

    random = np.random.default_rng(0)
    predicted = random.normal(size=(3, 8)).astype(np.float32)
    corpus = random.normal(size=(20, 8)).astype(np.float32)
    corpus /= np.linalg.norm(corpus, axis=1, keepdims=True)
    positives = [np.array([4, 7]), np.array([0]), np.array([1, 2])]
    ids = np.array([[4, 7], [0, -1], [1, 2]])
    batch = Batch(
        context=jnp.zeros((3, 1, 8)),
        context_mask=jnp.zeros((3, 1), bool),
        query=jnp.zeros((3, 8)),
        target=jnp.asarray(corpus[ids[:, 0]]),
        target_id=jnp.asarray(ids[:, 0]),
        positive_ids=jnp.asarray(ids),
        example=jnp.arange(3),
        positives=jnp.asarray(np.where(ids[..., None] >= 0, corpus[ids], 0)),
    )
    expected = corpus_info_nce(jnp.asarray(predicted), batch, in_chunks(corpus, 8), temperature=0.05)

    def model(features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sentence_embedding": features["rows"]}

    rows = {"rows": torch.from_numpy(predicted)}
    loss = CorpusSoftmaxLoss(model, corpus, positives, temperature=0.05)([rows], torch.tensor([0, 1, 2]))
    assert float(loss) == pytest.approx(float(expected.loss.mean()), rel=1e-5)

"""The levers of the text predictor: each trains, changes what it says, and is compared with the plain row."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_bert

from prime_jax.data.records import Dataset, Example, Passage, write_dataset

pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks import text_levers


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("levers")
    random = np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(random.choice(tiny_bert.WORDS, count))

    corpus = tuple(Passage(f"p{row}", words(5)) for row in range(60))

    def example(split: str, row: int) -> Example:
        turns = (corpus[row].text, words(3))[: row % 3]
        extra = {"rewrite": corpus[row].text} if row % 2 else {}
        return Example(f"{split}{row}", turns, words(4), (f"p{row}", f"p{row + 20}"), extra=extra)

    splits = {
        split: tuple(example(split, row) for row in rows)
        for split, rows in (("train", range(24)), ("dev", range(12, 36)))
    }
    write_dataset(folder / "data", Dataset(corpus, splits))
    encoder = tiny_bert.write_folder(folder / "encoder", tiny_bert.tensors())
    return [
        *("--data", str(folder / "data"), "--split", "dev", "--epochs", "1", f"--data.encoder={encoder}"),
        *("--model.input-dim=32", "--model.output-dim=32", "--model.max-tokens=32"),
    ]


def test_every_lever_changes_the_ranking_and_is_compared(command: list[str], tmp_path: Path) -> None:
    out = tmp_path / "levers.json"
    text_levers.main([*command, "--out", str(out)])
    found = json.loads(out.read_text())
    assert set(found["table"]) == {*text_levers.LEVERS, "cross_encoder"}
    plain = found["cells"]["as_it_is"]["0"]["found"]
    for name, cells in found["cells"].items():
        assert (cells["0"]["found"] == plain) == (name == "as_it_is"), name
    assert set(found["against"]["cloze"]) == {"as_it_is"}


def test_a_passage_has_the_largest_of_its_scores() -> None:
    import torch

    vectors = torch.eye(3)[None, :2]  # one question, two vectors
    corpus = torch.tensor([[0.0, 0.0, 1.0], [0.6, 0.8, 0.0], [1.0, 0.0, 0.0]])
    assert text_levers.best_scores(vectors, corpus).tolist() == [[0.0, pytest.approx(0.8), 1.0]]

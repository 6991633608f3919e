import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from prime_jax.config import Config, DataConfig
from prime_jax.data.records import Dataset, Example, Passage, load_dataset, write_dataset
from prime_jax.data.store import text_key
from prime_jax.evaluate import run as run_module
from prime_jax.evaluate.__main__ import main
from prime_jax.predict import text as text_module
from prime_jax.predict.predictor import Predictor

DIM = 16
DOCUMENTS = {"train": range(0, 8), "dev": range(8, 12), "test": range(12, 17)}


class WordEncoder:
    """Sum of one random vector per word: texts that share words are near each other."""

    identity, dim = "words@1", DIM

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        rows = [sum(self._word(word) for word in text.split()) for text in texts]
        return np.array([row / np.linalg.norm(row) for row in rows], np.float32)

    def _word(self, word: str) -> np.ndarray:
        return np.random.default_rng(list(text_key(word))).normal(size=DIM)


CONFIG = Config(data=DataConfig(encoder="words", query_prefix="q: "))


@dataclass
class FakeRun(Predictor):
    """A predictor that answers with query + last turn, which a reader can compute."""

    config: Config | None = CONFIG
    encoder: str = "words@1"
    data_hash: str = ""
    target_head: None = None
    confidence: None = None
    reads_text: bool = False
    takes_one_text: bool = False

    def info(self):
        return {"encoder": self.encoder, "data_hash": self.data_hash, "step": 3}

    def predict(self, context, query, context_mask):
        last = context_mask.sum(axis=1) - 1
        turn = np.where((last >= 0)[:, None], context[np.arange(len(query)), last], 0)
        return ((query + turn) / np.linalg.norm(query + turn, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of five paragraphs; a paragraph shares words with its document and with the next one."""
    folder = tmp_path_factory.mktemp("data")

    def text(document: int, part: int) -> str:
        return f"topic{document} step{document}.{part} step{document}.{part + 1}"

    corpus = [
        Passage(f"d{d}#{part}", text(d, part))
        for rows in DOCUMENTS.values()
        for d in rows
        for part in range(5)
    ]

    def example(document: int, part: int) -> Example:
        names = [f"d{document}#{number}" for number in range(part + 2)]
        turns = tuple(text(document, number) for number in range(part))
        query, right = text(document, part), (names[-1],)
        return Example(f"d{document}@{part}", turns, query, right, exclude=tuple(names[:-1]))

    splits = {
        name: tuple(example(document, part) for document in documents for part in range(4))
        for name, documents in DOCUMENTS.items()
    }
    write_dataset(folder, Dataset(tuple(corpus), splits))
    return folder


@pytest.fixture
def command(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def start(fake: FakeRun, *more: str) -> int:
        monkeypatch.setattr(run_module, "load", lambda path, precision, encoder: fake)
        monkeypatch.setattr(text_module, "load_encoder", lambda *name, stored_in=None: WordEncoder())
        folders = ["--run", "runs/x", "--data", str(prepared), "--out", str(tmp_path / "report")]
        return main([*folders, "--store", str(tmp_path / "store"), *more])

    return SimpleNamespace(start=start, out=tmp_path / "report")


def test_an_index_that_is_exact_gives_the_same_report(command) -> None:
    reports = []
    for index in ("exact", "faiss"):
        assert command.start(FakeRun(), "--index", index) == 0
        reports.append(json.loads((command.out / "report.json").read_text()))
    exact, other = reports
    for name, scores in exact["methods"].items():
        assert other["methods"][name] == pytest.approx(scores), name
    assert (exact["index"], other["index"]) == ("exact", "faiss")
    assert "searched with the index 'faiss'" in (command.out / "report.md").read_text()


def test_writes_the_report_and_prints_the_table(command, prepared: Path, capsys: pytest.CaptureFixture[str]):
    trained_on = load_dataset(prepared, ("train", "dev")).hash
    assert command.start(FakeRun(data_hash=trained_on)) == 0
    values = json.loads((command.out / "report.json").read_text())
    assert (values["split"], values["queries"], values["corpus"]) == ("test", 20, 85)
    assert values["groups"] == 5  # the questions of one document share its paragraphs
    assert values["data"]["trained_on_it"] is True
    assert values["data"]["turns"] == {"train": 48, "dev": 24, "test": 30}
    assert values["run"]["step"] == 3
    assert "last_turn_concat" in values["methods"]
    printed = capsys.readouterr().out
    assert f"{values['methods']['predicted']['MRR@10']:.3f}" in printed
    assert " ".join(values["headline"].split()[:6]) in " ".join(printed.split())
    assert str(command.out / "report.html") in printed


def test_another_split_can_be_measured(command):
    assert command.start(FakeRun(), "--split", "dev") == 0
    values = json.loads((command.out / "report.json").read_text())
    assert (values["split"], values["queries"]) == ("dev", 16)
    assert values["data"]["trained_on_it"] is False
    assert "favours the baselines" in (command.out / "report.md").read_text()


def test_a_first_search_can_give_the_context(command):
    config = Config(data=DataConfig(encoder="words", context_from="search", first_pass_k=2))
    assert command.start(FakeRun(config=config)) == 0
    values = json.loads((command.out / "report.json").read_text())
    assert values["data"]["turns"]["test"] == 40


@pytest.mark.parametrize(
    ("fake", "more", "message"),
    [
        (
            FakeRun(encoder="other@2"),
            (),
            "was trained on embeddings of other@2, but data.encoder 'words' is words@1",
        ),
        (FakeRun(config=None), (), "does not say which encoder"),
        (FakeRun(), ("--split", "nowhere"), "nowhere.jsonl"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(command, fake, more, message, capsys):
    assert command.start(fake, *more) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not command.out.exists()


def test_a_missing_run_is_one_line_and_exit_code_2(prepared: Path, tmp_path: Path, capsys):
    assert (
        main(["--run", str(tmp_path / "none"), "--data", str(prepared), "--out", str(tmp_path / "out")]) == 2
    )
    assert capsys.readouterr().err.startswith("prime-jax evaluate: ")


def test_an_unwritable_folder_is_one_line_and_exit_code_2(command, capsys):
    command.out.write_text("a file where the folder should be")
    assert command.start(FakeRun()) == 2
    assert capsys.readouterr().err.count("\n") == 1

"""Every recipe on small files in the format that is really published, to a folder that really loads."""

import gzip
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pytest

from prime_jax.config import read_config
from prime_jax.data.records import Example, load_dataset

TRAIN = Path(__file__).parents[1] / "train"
CONFIGS = TRAIN.parent / "configs"
MANY = 80  # enough for one in twenty to be there


def recipe(name: str) -> Callable[[Sequence[str]], int]:
    spec = importlib.util.spec_from_file_location(name, TRAIN / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module.main


def made(name: str, *words: object) -> tuple[dict[str, str], dict[str, dict[str, Example]]]:
    """Text of each passage, and the examples of each split by id."""
    out = Path(str(words[-1]))
    assert recipe(name)([str(word) for word in words[:-1]] + ["--out", str(out)]) == 0
    dataset = load_dataset(out)
    assert "Licence of the data: " in (out / "SOURCE.md").read_text()
    return (
        {passage.id: passage.text for passage in dataset.corpus},
        {split: {row.id: row for row in rows} for split, rows in dataset.splits.items()},
    )


def as_json(path: Path, rows: object) -> Path:
    path.write_text(json.dumps(rows))
    return path


def as_lines(path: Path, rows: Sequence[object]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def hotpot(number: int, title: str = "") -> dict[str, Any]:
    return {
        "_id": f"5a7a{number}",
        "question": f"Which band was formed first, band {number}?",
        "answer": "yes",
        "type": "comparison",
        "level": "hard",
        "supporting_facts": [[title or f"A{number}", 0], [f"B{number}", 1], [f"B{number}", 0]],
        "context": [
            [f"A{number}", [f"A{number} is a band.", " It was formed in 1990."]],
            ["Common", ["The same paragraph everywhere."]],
            [f"B{number}", [f"B{number} is a band.", "  It is younger."]],
        ],
    }


def test_hotpotqa(tmp_path: Path) -> None:
    train = as_json(tmp_path / "hotpot_train_v1.1.json", [*map(hotpot, range(MANY)), hotpot(999, "Nowhere")])
    dev = as_json(tmp_path / "hotpot_dev_distractor_v1.json", [hotpot(500)])
    corpus, splits = made("prepare_hotpotqa", train, dev, tmp_path / "out")
    assert len(corpus) == 2 * (MANY + 2) + 1
    assert len(splits["train"]) + len(splits["dev"]) == MANY
    assert splits["dev"]
    (example,) = splits["test"].values()
    assert [corpus[name] for name in example.positives] == [
        "A500: A500 is a band. It was formed in 1990.",
        "B500: B500 is a band. It is younger.",
    ]
    assert (example.context, example.extra["level"]) == ((), "hard")
    assert (
        "left out, a supporting paragraph is not among the given ones: 1"
        in (tmp_path / "out" / "SOURCE.md").read_text()
    )


def test_msmarco(tmp_path: Path) -> None:
    collection = "".join(f'{number}\tPassage "{number}" on costs.\n' for number in range(1000))
    (tmp_path / "collection.tsv.gz").write_bytes(gzip.compress(collection.encode()))
    files = {
        "queries.train.tsv": "".join(f"{q}\twhat does {q} cost\n" for q in range(400)),
        "qrels.train.tsv": "".join(f"{q}\t0\t{q * 2}\t1\n" for q in range(399)) + "3\t0\t7\t1\n",
        "queries.dev.small.tsv": "9001\ta dev question\n",
        "qrels.dev.small.tsv": "9001\t0\t997\t1\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    words = ["--collection", tmp_path / "collection.tsv.gz", "--queries", tmp_path / "queries.train.tsv"]
    words += ["--qrels", tmp_path / "qrels.train.tsv", "--dev-queries", tmp_path / "queries.dev.small.tsv"]
    words += ["--dev-qrels", tmp_path / "qrels.dev.small.tsv"]
    corpus, splits = made("prepare_msmarco", *words, "--share", "0.5", tmp_path / "out")
    assert corpus["m7"] == 'Passage "7" on costs.'
    assert 400 + 200 < len(corpus) < 400 + 400  # all right answers and half of the 600 others
    assert len(splits["train"]) + len(splits["dev"]) == 399
    assert splits["test"]["q9001"].positives == ("m997",)
    both = (splits["train"] | splits["dev"])["q3"]
    assert both.positives == ("m6", "m7")


def page(number: int, *, original: bool = False, answered: bool = True) -> dict[str, Any]:
    text = (
        f"<H1> Title </H1> <P> The first paragraph of page {number} has more than ten words in all . </P> "
        f"<Ul> <Li> A list of page {number} with one item and again more than ten words . </Li> </Ul> "
        "<P> Short . </P>"
    )
    tokens = text.split(" ")
    starts = [index for index, token in enumerate(tokens) if token in ("<P>", "<Ul>", "<Li>")]
    ends = [tokens.index("</P>") + 1, tokens.index("</Ul>") + 1, tokens.index("</Li>") + 1, len(tokens)]
    candidates = [
        {"start_token": start, "end_token": end, "top_level": tokens[start] != "<Li>"}
        for start, end in zip(starts, ends, strict=True)
    ]
    inner = candidates[2]
    answer = {"start_token": inner["start_token"], "end_token": inner["end_token"], "candidate_index": 2}
    none = {"start_token": -1, "end_token": -1, "candidate_index": -1}
    row: dict[str, Any] = {
        "example_id": 797803103760793766 + number,
        "question_text": f"which item is on page {number}",
        "document_url": f"https://en.wikipedia.org//w/index.php?title=Page_{number}%21&amp;oldid=1",
        "long_answer_candidates": candidates,
        "annotations": [{"long_answer": none}, {"long_answer": answer if answered else none}],
    }
    if original:
        row["document_tokens"] = [{"token": token, "html_token": token.startswith("<")} for token in tokens]
        row["document_title"] = f"Page {number}!"
    else:
        row["document_text"] = text
    return row


def test_natural_questions(tmp_path: Path) -> None:
    """The answer is an item within a list, and the list is the passage."""
    rows = [*map(page, range(MANY)), page(777, answered=False)]
    train = as_lines(tmp_path / "simplified-nq-train.jsonl.gz", rows)
    test = as_lines(tmp_path / "nq-dev-00.jsonl", [page(900, original=True)])
    corpus, splits = made("prepare_natural_questions", "--train", train, "--test", test, tmp_path / "out")
    assert len(corpus) == 2 * (MANY + 2)
    assert len(splits["train"]) + len(splits["dev"]) == MANY
    (example,) = splits["test"].values()
    (right,) = example.positives
    assert corpus[right] == "Page 900!: A list of page 900 with one item and again more than ten words ."
    assert example.query == "which item is on page 900"


def test_qrecc(tmp_path: Path) -> None:
    def turn(conversation: int, number: int, *, truth: bool = True) -> dict[str, Any]:
        said = [f"question {conversation} 1", f"answer {conversation} 1"][: 2 * (number - 1)]
        row = {"Conversation_no": conversation, "Turn_no": number, "Context": said}
        row["Question"] = f"question {conversation} {number}"
        known = {"Truth_rewrite": f"rewritten {conversation} {number}", "Truth_answer": "a"}
        known["Truth_passages"] = [f"http://x/{conversation}_p{number}"] if number < 3 else []
        return row | (known if truth else {})

    train = as_json(tmp_path / "train.json", [turn(c, t) for c in range(MANY) for t in (1, 2, 3)])
    test = as_json(tmp_path / "test.json", [turn(500, 2, truth=False)])
    (whole,) = [turn(500, 2)]
    truth = as_json(tmp_path / "truth.json", [{k: v for k, v in whole.items() if k != "Question"}])
    folder = tmp_path / "collection-paragraph"
    folder.mkdir()
    ids = [f"http://x/{c}_p{t}" for c in [*range(MANY), 500] for t in (1, 2)]
    as_lines(folder / "a.jsonl", [{"id": name, "contents": f"contents of {name}"} for name in ids])
    as_lines(folder / "b.jsonl.gz", [{"id": f"http://y/{n}", "contents": f"other {n}"} for n in range(100)])
    words = ["--train", train, "--test", test, "--test-truth", truth, "--passages", folder]
    corpus, splits = made("prepare_qrecc", *words, "--share", "0.3", tmp_path / "out")
    assert 2 * (MANY + 1) + 10 < len(corpus) < 2 * (MANY + 1) + 60
    train_chats, dev_chats = ({name.split("_")[0] for name in splits[split]} for split in ("train", "dev"))
    assert dev_chats
    assert not train_chats & dev_chats
    assert len(splits["train"]) + len(splits["dev"]) == 2 * MANY
    (example,) = splits["test"].values()
    assert example.context == ("question 500 1", "answer 500 1")
    assert (example.query, example.extra["rewrite"]) == ("question 500 2", "rewritten 500 2")
    assert [corpus[name] for name in example.positives] == ["contents of http://x/500_p2"]


def test_topiocqa(tmp_path: Path) -> None:
    def turn(conversation: int, number: int) -> dict[str, Any]:
        gold = {
            "id": f"wiki:{conversation}{number}",
            "title": "Dunkirk [SEP] Plot",
            "text": f"Soldiers {number}.",
        }
        return {
            "Conversation_no": conversation,
            "Turn_no": number,
            "Context": ["when was it", "in 1940"][: 2 * (number - 1)],
            "Question": f"who was there {number}",
            "Topic": "Dunkirk",
            "Gold_passage": gold if number < 3 else {"id": "", "title": "", "text": ""},
        }

    train = as_lines(tmp_path / "topiocqa_train.jsonl", [turn(c, t) for c in range(MANY) for t in (1, 2, 3)])
    valid = as_lines(tmp_path / "topiocqa_valid.jsonl", [turn(500, 2)])
    rows = "".join(
        f"{number}\tText {number}\tPage {number} [SEP] Start\n" for number in range(10_000, 10_200)
    )
    (tmp_path / "full_wiki_segments.tsv").write_text("id\ttext\ttitle\n" + rows)
    words = [train, valid, "--collection", tmp_path / "full_wiki_segments.tsv", "--share", "0.25"]
    corpus, splits = made("prepare_topiocqa", *words, tmp_path / "out")
    assert 2 * MANY + 1 + 30 < len(corpus) < 2 * MANY + 1 + 70
    (example,) = splits["test"].values()
    assert corpus[example.positives[0]] == "Dunkirk, Plot: Soldiers 2."
    assert example.context == ("when was it", "in 1940")
    assert "- left out, has no answer: 80" in (tmp_path / "out" / "SOURCE.md").read_text()


def beir(folder: Path, *judged: str) -> Path:
    (folder / "qrels").mkdir(parents=True)
    passages = [
        {"_id": f"doc {n}", "title": f"Title {n}", "text": f"Text {n}.", "metadata": {}} for n in range(300)
    ]
    as_lines(folder / "corpus.jsonl", [*passages, {"_id": "doc x", "title": "", "text": "No title."}])
    as_lines(folder / "queries.jsonl.gz", [{"_id": f"q{n}", "text": f"question {n}"} for n in range(300)])
    for part, name in enumerate(judged):
        rows = [f"q{n}\tdoc {n}\t1\nq{n}\tdoc {(n + 1) % 300}\t0\n" for n in range(part, 300, len(judged))]
        (folder / "qrels" / f"{name}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows))
    return folder


@pytest.mark.parametrize("judged", [("train", "dev", "test"), ("train", "test"), ("test",)])
def test_beir(tmp_path: Path, judged: tuple[str, ...]) -> None:
    corpus, splits = made("prepare_beir", beir(tmp_path / "set", *judged), tmp_path / "out")
    assert (corpus["doc_7"], corpus["doc_x"]) == ("Title 7: Text 7.", "No title.")
    assert sorted(splits) == ["dev", "test", "train"]
    assert sum(map(len, splits.values())) == 300
    for name, example in {**splits["train"], **splits["dev"], **splits["test"]}.items():
        assert example.positives == (f"doc_{name[1:]}",)
    if judged == ("test",):
        assert [round(len(splits[name]) / 300, 1) for name in ("train", "dev", "test")] == [0.6, 0.1, 0.3]
    elif len(judged) == 2:
        assert len(splits["test"]) == 150
        assert 5 < len(splits["dev"]) < 30


def test_a_beir_folder_without_judgements_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipe("prepare_beir")([str(beir(tmp_path / "set")), "--out", str(tmp_path / "out")]) == 2
    assert "qrels: holds none of train.tsv, dev.tsv and test.tsv" in capsys.readouterr().err
    assert recipe("prepare_beir")([str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "corpus.jsonl: the file is missing" in capsys.readouterr().err


class ByLetters:
    """Counts letters: texts that share many are near."""

    identity, dim = "letters@1", 26

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        counts = np.array([[text.lower().count(letter) for letter in ascii_lowercase] for text in texts])
        return (counts / np.linalg.norm(counts, axis=1, keepdims=True)).astype(np.float32)


def test_next_hop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The right passage nearest to the question is given, the others are to be found."""
    source, out = tmp_path / "facts", tmp_path / "out"
    source.mkdir()
    texts = {"a": "zzz", "b": "abc abd", "c": "qqq"}
    as_lines(source / "corpus.jsonl", [{"id": name, "text": text} for name, text in texts.items()])
    rows = [
        {"id": "two", "context": ["t"], "query": "abc", "positives": ["a", "b", "c"]},
        {"id": "one", "context": [], "query": "abc", "positives": ["a"]},
    ]
    for split in ("train", "dev"):
        as_lines(source / f"{split}.jsonl", rows)
    monkeypatch.setattr("prime_jax.data.encode.load_encoder", lambda *name: ByLetters())
    passages, examples = made("prepare_next_hop", source, out)
    assert passages == texts
    for split in ("train", "dev"):
        (example,) = examples[split].values()
        assert (example.id, example.context) == ("two", ("t", "abc abd"))
        assert (example.positives, example.exclude) == (("a", "c"), ("b",))


def test_next_hop_of_an_empty_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe("prepare_next_hop")([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds no train.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["hotpotqa", "msmarco", "natural_questions", "qrecc", "topiocqa"])
def test_what_is_missing_is_one_line_and_exit_code_2(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = str(tmp_path / "gone.json")
    words = {
        "hotpotqa": [gone, gone],
        "msmarco": [
            *("--collection", gone, "--queries", gone, "--qrels", gone),
            *("--dev-queries", gone, "--dev-qrels", gone),
        ],
        "natural_questions": ["--train", gone, "--test", gone],
        "qrecc": ["--train", gone, "--test", gone, "--passages", gone],
        "topiocqa": [gone, gone],
    }[name]
    assert recipe(f"prepare_{name}")([*words, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"prepare_{name}: {gone}: there is no such file\n"


@pytest.mark.parametrize("name", ["hotpotqa", "msmarco", "natural_questions", "qrecc", "topiocqa"])
def test_each_has_a_configuration(name: str) -> None:
    config = read_config(CONFIGS / f"{name}.yaml")
    conversation = name in ("qrecc", "topiocqa")
    assert config.data.context_from == ("data" if conversation else "search")
    assert config.data.path == f"data/{name}"

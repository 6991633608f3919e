import json
from pathlib import Path
from typing import Any

import pytest

from prime_jax.data.records import Dataset, Example, Passage, load_dataset, write_dataset
from prime_jax.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"

CORPUS: list[dict[str, Any]] = [
    {"id": "a", "text": "Tea is a drink."},
    {"id": "b", "text": "Coffee is a drink, too."},
    {"id": "c", "text": "Größe zählt."},
]
QUERY: dict[str, Any] = {"id": "q", "context": ["Hello", "Hi"], "query": "What is tea?", "positives": ["a"]}


def put(folder: Path, *, corpus: list[Any] = CORPUS, **splits: list[Any]) -> Path:
    for name, rows in {"corpus": corpus, **splits}.items():
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return folder


def test_a_folder_becomes_a_dataset(tmp_path: Path) -> None:
    row = QUERY | {"negatives": ["b"], "exclude": ["c"], "type": "bridge", "entities": ["hotel/0"]}
    put(tmp_path, train=[row], dev=[QUERY])
    dataset = load_dataset(tmp_path)
    assert dataset.corpus[2] == Passage("c", "Größe zählt.")
    extra = {"type": "bridge", "entities": ["hotel/0"]}
    expected = Example("q", ("Hello", "Hi"), "What is tea?", ("a",), ("b",), ("c",), None, extra)
    assert dataset.splits == {
        "train": (expected,),
        "dev": (Example("q", ("Hello", "Hi"), "What is tea?", ("a",)),),
    }


def test_only_the_named_splits_are_read(tmp_path: Path) -> None:
    put(tmp_path, train=["broken"], dev=[QUERY], held_out=[QUERY])
    assert list(load_dataset(tmp_path, ["dev", "held_out"]).splits) == ["dev", "held_out"]
    assert load_dataset(tmp_path, []).splits == {}


def test_scopes_are_read(tmp_path: Path) -> None:
    put(tmp_path, corpus=[CORPUS[0] | {"scope": "hot"}, CORPUS[1]], train=[QUERY | {"scope": "hot"}])
    dataset = load_dataset(tmp_path)
    assert [passage.scope for passage in dataset.corpus] == ["hot", None]
    assert dataset.splits["train"][0].scope == "hot"


def test_byte_order_mark_crlf_and_blank_lines_change_nothing(tmp_path: Path) -> None:
    plain = load_dataset(put(tmp_path, train=[QUERY]))
    for path in tmp_path.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n"))
    assert load_dataset(tmp_path) == plain


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    dataset = Dataset(
        (Passage("a", 'tea "x"\n\u2028é', "s", {"kind": "review"}), Passage("b", "milk", "s")),
        {"test": (Example("q", (), "?", ("a",), ("b",), (), "s", {"entities": [1, {"k": None}]}),)},
    )
    write_dataset(tmp_path / "new" / "folder", dataset)
    again = load_dataset(tmp_path / "new" / "folder")
    assert again == dataset
    assert again.hash == dataset.hash


def test_writing_refuses_a_folder_with_a_split_of_other_data(tmp_path: Path) -> None:
    put(tmp_path, train=[QUERY], dev=[QUERY])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match=r"dev\.jsonl: belongs to other data"):
        write_dataset(tmp_path, Dataset((Passage("x", "y"),), {"train": (Example("q", (), "?", ("x",)),)}))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_failed_write_leaves_the_old_files(tmp_path: Path) -> None:
    put(tmp_path, train=[QUERY])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    unwritable = Example("q", (), "?", ("a",), extra={"score": float("nan")})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_dataset(tmp_path, Dataset((Passage("x", "y"),), {"train": (unwritable,)}))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "change",
    [
        {"query": "What is Tea?"},
        {"context": ["Hi", "Hello"]},
        {"context": ["Hello Hi"]},
        {"exclude": ["b"]},
        {"negatives": ["b"]},
        {"note": "x"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_hash_follows_the_content(tmp_path: Path, change: dict[str, Any]) -> None:
    first = load_dataset(put(tmp_path, train=[QUERY])).hash
    assert load_dataset(put(tmp_path, train=[QUERY | change])).hash != first
    assert load_dataset(put(tmp_path, train=[QUERY])).hash == first


def test_the_hash_does_not_follow_the_order_of_keys(tmp_path: Path) -> None:
    first = load_dataset(put(tmp_path, train=[QUERY])).hash
    assert load_dataset(put(tmp_path, train=[dict(reversed(QUERY.items()))])).hash == first


MISTAKES = [
    ({"query": None}, "'query' must be a string, not null"),
    ({"query": "  "}, "'query' is empty"),
    ({"query": "a\0b"}, "'query' holds a NUL character"),
    ({"query": "\ud800"}, "half of a surrogate pair"),
    ({"id": 7}, "'id' must be a string, not a number"),
    ({"id": ""}, "'id' is empty"),
    ({"context": "Hello"}, "'context' must be a list of strings, not a string"),
    ({"context": ["Hello", 3]}, r"'context'\[1\] must be a string, not a number"),
    ({"positives": []}, "'positives' is empty"),
    ({"positives": ["a", "a"]}, "'positives' names 'a' twice"),
    ({"positives": ["a", "zz"]}, "'positives' names 'zz', which is not in the corpus"),
    ({"negatives": ["zz"]}, "'negatives' names 'zz', which is not in the corpus"),
    ({"exclude": ["zz"]}, "'exclude' names 'zz', which is not in the corpus"),
    ({"negatives": None}, "'negatives' must be a list of strings, not null"),
    ({"negatives": ["b", "a"]}, "'a' is in 'positives' and in 'negatives'"),
    ({"exclude": ["a"]}, "'a' is in 'positives' and in 'exclude'"),
    ({"scope": "x"}, "the scope is 'x', that of its positive 'a' is None"),
    ({"scope": True}, "'scope' must be a string, not a truth value"),
    ({"positve": ["a"]}, r"unknown key 'positve'; did you mean 'positives'\?"),
    ({"negative": ["b"]}, r"unknown key 'negative'; did you mean 'negatives'\?"),
    ({"Excluded": ["b"]}, r"unknown key 'Excluded'; did you mean 'exclude'\?"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_wrong_value_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    put(tmp_path, train=[QUERY | {"id": "first"}, QUERY | change])
    with pytest.raises(DataError, match=rf"train\.jsonl, line 2: .*{message}"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("key", ["id", "context", "query", "positives"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    put(tmp_path, train=[{name: value for name, value in QUERY.items() if name != key}])
    with pytest.raises(DataError, match=rf"train\.jsonl, line 1: the key '{key}' is missing"):
        load_dataset(tmp_path)


LINES = [
    (b'{"id": "d", "text": ', "not valid JSON"),
    (b'["d", "text"]', "must be a JSON object, not a list"),
    (b'{"id": "d", "text": "x", "id": "e"}', "the key 'id' is there twice"),
    (b'{"id": "d", "text": "x", "n": NaN}', "NaN is not JSON"),
    (b"[" * 100_000, "not valid JSON"),
    (b'{"id": "d", "text": "\xff"}', r"not UTF-8 \(byte 22 of the line\)"),
    (b'{"id": "d", "text": "a\0"}', "holds a NUL character"),
    (b'{"id": "d", "text": "a\\u0000"}', "'text' holds a NUL character"),
    (b'{"id": "d", "txt": "x"}', "the key 'text' is missing|unknown key 'txt'"),
    (b'{"id": "a", "text": "x"}', "the id 'a' is there twice"),
]


@pytest.mark.parametrize(("line", "message"), LINES, ids=[message for _, message in LINES])
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    put(tmp_path, train=[QUERY])
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(DataError, match=rf"corpus\.jsonl, line 4: .*({message})"):
        load_dataset(tmp_path)


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: there is no such folder"):
        load_dataset(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds none of train"):
        load_dataset(tmp_path)
    put(tmp_path, corpus=[], train=[QUERY])
    with pytest.raises(DataError, match=r"corpus\.jsonl: the file is empty"):
        load_dataset(tmp_path)
    (tmp_path / "corpus.jsonl").unlink()
    with pytest.raises(DataError, match=r"corpus\.jsonl: the file is missing"):
        load_dataset(tmp_path)
    put(tmp_path, train=[" "])
    with pytest.raises(DataError, match=r"train\.jsonl: the file is empty"):
        load_dataset(tmp_path)
    with pytest.raises(DataError, match=r"test\.jsonl: the file is missing"):
        load_dataset(tmp_path, ["test"])
    with pytest.raises(DataError, match="cannot be the name of a split"):
        load_dataset(tmp_path, ["../train"])


@pytest.mark.parametrize("split", ["dev", "test", "mine"])
def test_a_repeated_example_id_is_an_error_outside_train(tmp_path: Path, split: str) -> None:
    put(tmp_path, **{split: [QUERY, QUERY | {"query": "Other?"}]})
    with pytest.raises(
        DataError,
        match=rf"{split}\.jsonl, line 2: the id 'q' is there twice \(see .*{split}\.jsonl, line 1\)",
    ):
        load_dataset(tmp_path, [split])


def test_in_train_another_example_may_repeat_an_id_but_not_the_same_one(tmp_path: Path) -> None:
    put(tmp_path, train=[QUERY, QUERY | {"positives": ["b"]}])
    with pytest.warns(UserWarning, match=r"1 examples repeat the id of another one, the first at .*line 2"):
        assert len(load_dataset(tmp_path).splits["train"]) == 2
    put(tmp_path, train=[QUERY, QUERY | {"positives": ["b"]}, QUERY])
    with pytest.raises(DataError, match=r"train\.jsonl, line 3: the id 'q' is there twice"):
        load_dataset(tmp_path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not on this machine")
@pytest.mark.filterwarnings("ignore:.*repeat the id")
@pytest.mark.parametrize(
    ("name", "corpus", "train", "dev"),
    [
        ("chatnext", 19529, 13670, 600),
        ("convknow", 10882, 1309, 220),
        ("entbank", 11471, 1226, 176),
        ("hotpot", 8300, 1171, 150),
    ],
)
def test_real_sets_load(name: str, corpus: int, train: int, dev: int) -> None:
    dataset = load_dataset(SHARED / name)
    assert len(dataset.corpus) == corpus
    assert {split: len(rows) for split, rows in dataset.splits.items()} == {"train": train, "dev": dev}


def test_turns_without_text_are_left_out_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"id": "a", "text": "Tea is a drink."}\n')
    row = {**QUERY, "context": ["Hello", "", " \t", "Hi"]}
    (tmp_path / "dev.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.warns(
        UserWarning, match=r"dev\.jsonl: 2 turns have no text and are left out, the first at .*line 1"
    ):
        found = load_dataset(tmp_path, ["dev"])
    assert found.splits["dev"][0].context == ("Hello", "Hi")

"""The writer of recipes: a stopped run goes on to the same bytes, and nothing wrong is written."""

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prime_jax.data import recipe, records
from prime_jax.data.recipe import RecipeWriter, identity_of, records_of, share_of, tsv_rows, value
from prime_jax.data.records import Dataset, Example, Passage, load_dataset, write_dataset
from prime_jax.errors import DataError
from prime_jax.locks import OWNER, exclusive

COUNT = 57


def write(out: Path, stop_at: int = 10**9, identity: str = "a") -> None:
    """Passages 0 to 56, each but the last the answer of one before it; stops at a record, as if killed."""
    writer, seen = RecipeWriter(out, {"recipe": identity}), 0

    def rows() -> Iterator[int]:
        yield from range(COUNT)

    for stage in ("passages", "questions"):
        for number in writer.each(stage, rows()):
            seen += 1
            if seen > stop_at:
                raise KeyboardInterrupt
            if stage == "passages":
                writer.passage(Passage(f"p{number % 50}", f"text {number % 50}"))
            elif number % 7 == 0:
                writer.leave_out("divisible by seven")
            else:
                split = ("train", "train", "dev", "test")[number % 4]
                writer.example(
                    split, Example(f"e{number}", (), f"query {number}", (f"p{number % 50}",)), "here"
                )
    writer.finish("made up", "none")


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "EVERY", 10)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("stops", [[3], [25], [57, 1], [70], [113], [5, 12, 30, 30]])
def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path: Path, stops: list[int]) -> None:
    write(tmp_path / "whole")
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "stopped", stop)
        assert not (tmp_path / "stopped" / "corpus.jsonl").exists()
    write(tmp_path / "stopped")
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")
    dataset = load_dataset(tmp_path / "stopped")
    assert len(dataset.corpus) == 50
    assert sum(map(len, dataset.splits.values())) == COUNT - 9
    assert "- left out, divisible by seven: 9" in (tmp_path / "whole" / "SOURCE.md").read_text()


@pytest.mark.usefixtures("often")
def test_what_was_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 45)
    written = []
    plain = RecipeWriter.passage
    monkeypatch.setattr(
        RecipeWriter, "passage", lambda self, passage: (written.append(passage.id), plain(self, passage))
    )
    write(tmp_path)
    assert written[0] == "p40"


def test_other_input_does_not_go_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 60)
    with pytest.raises(DataError, match="holds an unfinished run on other input"):
        write(tmp_path, identity="b")
    write(tmp_path)
    with pytest.raises(DataError, match=r"corpus\.jsonl: is there already"):
        write(tmp_path)


def test_an_answer_that_is_no_passage_is_named(tmp_path: Path) -> None:
    writer = RecipeWriter(tmp_path, {})
    writer.passage(Passage("p1", "text"))
    with pytest.raises(DataError, match="record 3: the passage 'p2' is in none of the files given"):
        writer.example("train", Example("e", (), "query", ("p2",)), "record 3")
    for query, positives in (("", ("p1",)), ("query", ())):
        with pytest.raises(DataError, match="record 4: has no query, or no right answer"):
            writer.example("train", Example("e", (), query, positives), "record 4")
    with pytest.raises(DataError, match="'train' would be empty"):
        writer.finish("", "")


def test_lists_and_lines_packed_or_not_read_alike(tmp_path: Path) -> None:
    rows = [{"a": index, "b": 0.5} for index in range(5)]
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(rows, indent=1))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for name in ("a.json", "b.jsonl"):
        with gzip.open(tmp_path / f"{name}.gz", "wb") as stream:
            stream.write((tmp_path / name).read_bytes())
    for path in tmp_path.iterdir():
        found = list(records_of(path))
        assert [record for _, record in found] == rows, path
        assert isinstance(found[0][1]["b"], float)
    assert [place for place, _ in records_of(tmp_path / "a.json")][1] == f"{tmp_path / 'a.json'}, record 2"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"a": 1}, {"a":', r"a\.json, after record 1: not valid JSON, or cut off"),
        ("a.jsonl", b'{"a": 1}\n{"a":', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n[]', r"a\.jsonl, line 2: must be a JSON object"),
        ("a.jsonl", b'{"a": "\xff"}', r"a\.jsonl, line 1: not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9999)[:-20], r"a\.jsonl\.gz: cut off or damaged"),
    ],
)
def test_damaged_input_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(records_of(tmp_path / name))


def test_missing_files_columns_and_fields_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        identity_of([tmp_path / "a"])
    with pytest.raises(DataError, match="cannot be read"):
        list(records_of(tmp_path / "a"))
    (tmp_path / "a.tsv").write_text("1\tx\n2\n")
    with pytest.raises(DataError, match=r"a\.tsv, line 2: has 1 columns, expected 2"):
        list(tsv_rows(tmp_path / "a.tsv", 2))
    with pytest.raises(DataError, match=r"line 1: the key 'a' is missing \(found: b\)"):
        value({"b": 1}, "a", int, "line 1")
    with pytest.raises(DataError, match="line 1: 'a' must be of type int, not str"):
        value({"a": "1"}, "a", int, "line 1")


def test_shares_are_even_and_never_change() -> None:
    shares = [share_of(str(number)) for number in range(2000)]
    assert share_of("7") == shares[7]
    assert abs(sum(share < 0.25 for share in shares) / 2000 - 0.25) < 0.04


def test_the_folder_is_held_before_it_is_looked_at_and_free_after_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another recipe may finish between the look and the lock."""

    @contextmanager
    def finished_by_another(folder: Path, work: str) -> Iterator[None]:
        folder.mkdir(exist_ok=True)
        (folder / "corpus.jsonl").write_text("theirs")
        (folder / "test.jsonl").write_text("theirs")
        with exclusive(folder, work):
            yield

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "exclusive", finished_by_another)
        with pytest.raises(DataError, match=r"corpus\.jsonl: is there already"):
            RecipeWriter(tmp_path / "a", {})
        patch.setattr(records, "exclusive", finished_by_another)
        with pytest.raises(DataError, match=r"test\.jsonl: belongs to other data"):
            write_dataset(tmp_path / "b", Dataset((Passage("p", "text"),), {}))
    for folder in ("a", "b"):
        assert not (tmp_path / folder / OWNER).exists()
        assert (tmp_path / folder / "corpus.jsonl").read_text() == "theirs"
    writer = RecipeWriter(tmp_path / "c", {})
    with pytest.raises(DataError, match="'corpus' would be empty"):
        writer.finish("made up", "none")
    assert not (tmp_path / "c" / OWNER).exists()
    (tmp_path / "c").mkdir(exist_ok=True)
    (tmp_path / "c" / recipe.STATE).write_text("{")
    with pytest.raises(DataError, match="not valid JSON") as refused:
        RecipeWriter(tmp_path / "c", {})
    assert not (tmp_path / "c" / OWNER).exists(), refused  # whose traceback keeps the writer alive

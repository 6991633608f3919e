"""Several data folders as one: nothing is lost, nothing of one set is searched for another."""

from pathlib import Path

import pytest

from prime_jax.data.combine import combined, main
from prime_jax.data.grouping import conversation_labels
from prime_jax.data.records import Dataset, Example, Passage, load_dataset, write_dataset
from prime_jax.errors import DataError


def talk(name: str, rows: int, scope: str | None = None) -> Dataset:
    """Conversations of two questions each, answered by passages with the same ids in every set."""
    corpus = tuple(Passage(f"p{row}", f"{name} answer {row}", scope, {"page": row}) for row in range(rows))

    def example(row: int) -> Example:
        turns = (f"{name} talk {row // 2}",) if row % 2 else ()
        asked = f"{name} asks {row}" if row % 2 else f"{name} talk {row // 2}"
        wrong, seen = f"p{(row + 1) % rows}", f"p{(row + 2) % rows}"
        extra = {"conversation": f"c{row // 2}", "rewrite": f"what about {row}"}
        return Example(f"e{row}", turns, asked, (f"p{row}",), (wrong,), (seen,), scope, extra)

    examples = tuple(map(example, range(rows)))
    return Dataset(corpus, {"train": examples, "dev": examples[:4]})


def test_every_set_is_a_scope_of_its_own() -> None:
    whole = combined({"one": talk("one", 6), "two": talk("two", 8, "club")})
    assert [passage.id for passage in whole.corpus][:2] == ["one/p0", "one/p1"]
    assert {passage.scope for passage in whole.corpus} == {"one", "two/club"}
    assert whole.corpus[7].extra == {"page": 1}
    first, last = whole.splits["train"][1], whole.splits["train"][-1]
    assert first == Example(
        "one/e1",
        ("one talk 0",),
        "one asks 1",
        ("one/p1",),
        ("one/p2",),
        ("one/p3",),
        "one",
        {"conversation": "one/c0", "rewrite": "what about 1"},
    )
    assert (last.id, last.scope, last.positives) == ("two/e7", "two/club", ("two/p7",))
    assert [len(rows) for rows in whole.splits.values()] == [14, 8]


@pytest.mark.parametrize("key", [True, False])
def test_of_large_sets_some_whole_conversations_are_taken(key: bool) -> None:
    large = talk("large", 40)
    if not key:  # then texts tell which questions belong together
        for examples in large.splits.values():
            for example in examples:
                example.extra.pop("conversation", None)  # dev's first examples are those of train
    sets = {"large": large, "small": talk("small", 6)}
    whole = combined(sets, {"train": 10, "dev": None}, seed=1)
    ids = [one.id for one in whole.splits["train"]]
    of_large = [int(name.removeprefix("large/e")) for name in ids if name.startswith("large")]
    assert len(of_large) == 10
    assert of_large == sorted(of_large)
    assert all(row ^ 1 in of_large for row in of_large)
    assert len(ids) == 16
    assert len(whole.splits["dev"]) == 8
    again, other = (combined(sets, {"train": 10}, seed=seed) for seed in (1, 2))
    assert [one.id for one in again.splits["train"]] == ids
    assert [one.id for one in other.splits["train"]] != ids


def test_the_command_writes_a_data_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path / "one", talk("one", 6))
    write_dataset(tmp_path / "two", talk("two", 8))
    told = [str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "both")]
    assert main([*told, "--rows", "4"]) == 0
    assert "train          8  one 4, two 4" in capsys.readouterr().out
    whole = load_dataset(tmp_path / "both")
    assert {one.scope for one in whole.splits["train"]} == {"one", "two"}
    assert main([*told[:1], *told[:1], "--out", str(tmp_path / "twice")]) == 2
    assert "two folders of one name" in capsys.readouterr().err
    assert main([*told, "--rows", "0"]) == 2
    assert main([*told[:2], "--out", str(tmp_path / "one" / ".." / "one")]) == 2
    assert "is one of the sets" in capsys.readouterr().err


def test_a_split_that_one_set_lacks_is_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = talk("one", 6), talk("two", 8)
    tested = Dataset(large.corpus, {**large.splits, "test": large.splits["dev"]})
    write_dataset(tmp_path / "one", small)
    write_dataset(tmp_path / "two", tested)
    monkeypatch.chdir(tmp_path / "one")  # a set may be called "."
    assert main([".", "../two", "--out", "../both"]) == 0
    assert "test is left out: one has none" in capsys.readouterr().err
    assert sorted(load_dataset(tmp_path / "both").splits) == ["dev", "train"]
    assert load_dataset(tmp_path / "both").splits["train"][0].id == "one/e0"
    (tmp_path / "two" / "dev.jsonl").unlink()
    assert main([".", "../two", "--out", "../other"]) == 2
    assert "dev.jsonl" in capsys.readouterr().err


def test_sets_of_different_splits_are_refused() -> None:
    alone = Dataset(talk("one", 4).corpus, {"train": talk("one", 4).splits["train"]})
    with pytest.raises(DataError, match="different splits"):
        combined({"one": alone, "two": talk("two", 4)})


def test_a_conversation_has_a_name() -> None:
    examples = talk("one", 4).splits["train"]
    assert conversation_labels(examples).tolist() == [0, 0, 1, 1]
    examples[2].extra["conversation"] = None
    with pytest.raises(DataError, match="record 'e2': its 'conversation' is None"):
        conversation_labels(examples)
    del examples[2].extra["conversation"]
    assert conversation_labels(examples).tolist() == [0, 0, 1, 1]  # by the texts they share

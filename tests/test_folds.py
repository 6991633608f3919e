"""Folds: training and judged questions share no conversation and no value; what is pooled."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_rivals import CONFIG
from tiny_bert import WORDS, tensors, write_folder

from benchmarks import folds
from prime_jax.data.records import Dataset, Example, Passage, write_dataset
from prime_jax.errors import DataError


def example(row: int, entities: tuple[str, ...] = ()) -> Example:
    """Two questions of each conversation; they share its first turn."""
    extra: dict[str, Any] = {"entities": list(entities)} if entities else {}
    first, own = WORDS[row // 2 % len(WORDS)] * 2, WORDS[row % len(WORDS)] * 3
    return Example(f"q{row}", (f"{first} {row // 2}",), f"{own} {row}", (f"p{row}",), extra=extra)


def test_whole_conversations_go_into_a_fold_and_each_is_judged_once() -> None:
    examples = [example(row) for row in range(40)]
    parts = folds.cut(examples, 4, None)
    assert np.sum([judged for _, judged in parts], axis=0).tolist() == [1] * 40
    for known, judged in parts:
        np.testing.assert_array_equal(known, ~judged)
        np.testing.assert_array_equal(judged[::2], judged[1::2])


def test_nothing_trained_on_has_a_value_of_the_fold() -> None:
    names = [f"hotel {number}" for number in range(12)]
    rows = [
        (names[row % 12],) if row % 5 else (names[row % 12], names[(row * 7 + 1) % 12]) for row in range(60)
    ]
    examples = [example(row, entities) for row, entities in enumerate(rows)]
    parts = folds.cut(examples, 3, "entities")
    unseen = 0
    for known, judged in parts:
        assert known.any()
        assert not (known & judged).any()
        trained_on = {name for row in np.flatnonzero(known) for name in rows[row]}
        told = {f"{row // 2}" for row in np.flatnonzero(known)}
        assert told.isdisjoint(f"{row // 2}" for row in np.flatnonzero(judged))
        new = [row for row in np.flatnonzero(judged) if trained_on.isdisjoint(rows[row])]
        unseen += len(new)
        assert 0 < len(new) < judged.sum()  # both kinds of questions are judged
    assert unseen >= 40


def test_a_record_without_the_key_is_refused() -> None:
    with pytest.raises(DataError, match=r"--apart entities: record 'q1' has None there"):
        folds.cut([example(0, ("a",)), example(1)], 2, "entities")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Conversations of which each asks for a passage of its own."""
    random = np.random.default_rng(0)
    corpus = tuple(Passage(f"p{row}", " ".join(random.choice(WORDS, 5))) for row in range(40))
    train = tuple(example(row) for row in range(32))
    dev = tuple(
        Example(f"d{row}", (), " ".join(random.choice(WORDS, 3)), (f"p{row}",)) for row in range(32, 40)
    )
    write_dataset(tmp_path / "data", Dataset(corpus, {"train": train, "dev": dev}))
    return tmp_path / "data"


def test_all_folds_make_one_table_and_the_choice_among_ours_is_a_row(data: Path, tmp_path: Path) -> None:
    for name in ("small", "other"):
        (tmp_path / f"{name}.yaml").write_text(CONFIG)
    encoder, out = write_folder(tmp_path / "encoder", tensors()), tmp_path / "folds.json"
    command = [
        *("--data", str(data), "--out", str(out), "--keep", str(tmp_path / "kept"), "--folds", "2"),
        *("--config", str(tmp_path / "small.yaml"), str(tmp_path / "other.yaml"), "--seeds", "0"),
        *(f"--data.encoder={encoder}", "--only", "query", "small", "other"),
    ]
    folds.main(command)
    found, parts = json.loads(out.read_text()), []
    for fold in range(2):
        parts.append(json.loads((tmp_path / "kept" / f"fold{fold}.json").read_text()))
    assert found["queries"] == sum(part["queries"] for part in parts) == 32
    assert set(found["table"]) == {"query", "small", "other", "chosen"}
    for name in ("query", "small"):
        weighted = sum(part["queries"] * part["table"][name]["mean"]["MRR@10"] for part in parts) / 32
        assert found["table"][name]["mean"]["MRR@10"] == pytest.approx(weighted)
    assert found["table"]["chosen"]["mean"] == found["table"]["small"]["mean"]  # both are the same
    assert found["chosen_of_fold"] == ["small", "small"]
    assert set(found["against"]["chosen"]) == {"query"}
    seconds = parts[0]["cells"]["small"]["0"]["train_seconds"]
    folds.main(command)  # goes on from what is there
    again = json.loads((tmp_path / "kept" / "fold0.json").read_text())
    assert again["cells"]["small"]["0"]["train_seconds"] == seconds


def test_a_method_with_fewer_seeds_is_pooled_with_those_it_has() -> None:
    """The best of a fold may have been trained with one seed, another with two."""

    def cell(score: float) -> dict[str, Any]:
        costs = dict.fromkeys(("train_seconds", "ms", "ms_turns_kept", "mb"), 1.0)
        return {"ours": True, "found": [[1]], "about": {"dev_MRR@10": score}, **costs}

    tables = [
        {"cells": {"one": {"0": cell(0.5), "1": cell(0.5)}, "other": {"0": cell(best)}}}
        for best in (0.4, 0.9)
    ]
    cells = folds.pooled(tables)
    assert list(cells["one"]) == ["0", "1"]
    assert list(cells["other"]) == list(cells[folds.CHOSEN]) == ["0"]
    assert cells[folds.CHOSEN]["0"]["about"]["of_fold"] == ["one", "other"]

"""Hard negatives: near, but never the right answer or too near to it."""

from pathlib import Path

import numpy as np
import pytest

from prime_jax.data.embedded import EmbeddedDataset, embed_dataset
from prime_jax.data.negatives import context_negatives, mine_negatives, searches_of
from prime_jax.data.records import Dataset, Example, Passage
from prime_jax.data.store import EmbeddingStore


def embedded(folder: Path, dataset: Dataset, vectors: dict[str, np.ndarray]) -> EmbeddedDataset:
    dim = len(next(iter(vectors.values())))
    store = EmbeddingStore.open(folder, "points", dim)
    store.add(list(vectors), np.stack(list(vectors.values())).astype(np.float32))
    return embed_dataset(dataset, store, max_context_length=3)


def on_circle(degrees: float) -> np.ndarray:
    return np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], np.float32)


def circle(folder: Path, passages: dict[str, float], example: Example, **scopes: str) -> EmbeddedDataset:
    """Passages and a query (at 0 degrees) on the unit circle."""
    corpus = tuple(Passage(name, name, scopes.get(name)) for name in passages)
    dataset = Dataset(corpus, {"train": (example,)})
    points = {name: on_circle(degrees) for name, degrees in passages.items()}
    return embedded(folder, dataset, points | {"query": on_circle(0)})


def mined(data: EmbeddedDataset, count: int = 3, **searches: float) -> list[str]:
    """Names of the negatives found from these angles."""
    split = data.splits["train"]
    vectors = {name: on_circle(degrees)[None] for name, degrees in searches.items()}
    rows = mine_negatives(vectors, data, split, count=count)[0]
    return [data.corpus_ids[row] if row >= 0 else "-" for row in rows]


def test_the_margin_by_hand(tmp_path: Path) -> None:
    """The right answer at 60 degrees scores 0.5: what scores more than 0.475 is out, at -60 and at -61.5."""
    passages = {"right": 60.0, "above": -30.0, "just_out": -61.5, "just_in": -61.8, "far": 170.0}
    data = circle(tmp_path, passages, Example("1", (), "query", ("right",)))
    assert np.cos(np.radians(61.5)) > 0.475 > np.cos(np.radians(61.8))
    assert mined(data, query=0) == ["just_in", "far", "-"]


def test_a_near_copy_of_the_right_answer_is_no_negative(tmp_path: Path) -> None:
    """At 18 degrees from it the cosine is 0.951, at 19 it is 0.946."""
    passages = {"right": 40.0, "copy": 58.0, "other": 59.0}
    data = circle(tmp_path, passages, Example("1", (), "query", ("right",)))
    assert mined(data, query=0) == ["other", "-", "-"]


def test_searches_take_turns_and_name_nothing_twice(tmp_path: Path) -> None:
    passages = {"right": 0.0, "a": 40.0, "b": 50.0, "c": -55.0, "d": -62.0}
    data = circle(tmp_path, passages, Example("1", (), "query", ("right",)))
    assert mined(data, 4, up=10, down=-10) == ["a", "c", "b", "d"]


def test_exclude_scope_and_every_right_answer(tmp_path: Path) -> None:
    """Two right answers: the one that scores lower sets the bar."""
    passages = {"right": 0.0, "too": 80.0, "b": 30.0, "seen": 95.0, "elsewhere": 100.0, "c": 105.0}
    example = Example("1", (), "query", ("right", "too"), exclude=("seen",), scope="here")
    scopes = dict.fromkeys(("right", "too", "b", "seen", "c"), "here") | {"elsewhere": "there"}
    data = circle(tmp_path, passages, example, **scopes)
    assert mined(data, query=0) == ["c", "-", "-"]


def test_against_a_plain_loop(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    names = [f"p{number}" for number in range(60)]
    examples = tuple(
        Example(
            f"e{number}",
            (),
            f"q{number}",
            tuple(random.choice(names, size=1 + number % 2, replace=False)),
            exclude=tuple(random.choice(names, size=number % 3, replace=False)),
        )
        for number in range(25)
    )
    vectors = {name: random.normal(size=4) for name in [*names, *(example.query for example in examples)]}
    vectors = {name: vector / np.linalg.norm(vector) for name, vector in vectors.items()}
    corpus = tuple(Passage(name, name) for name in names)
    data = embedded(tmp_path, Dataset(corpus, {"train": examples}), vectors)
    split = data.splits["train"]
    predicted = random.normal(size=(25, 4)).astype(np.float32)
    predicted /= np.linalg.norm(predicted, axis=1, keepdims=True)
    searches = searches_of(data, split, predicted)
    assert list(searches) == ["query", "positive", "predicted"]
    found = mine_negatives(searches, data, split, count=5, depth=20, margin=0.1)
    passages = data.corpus()
    for number, example in enumerate(examples):
        right = [names.index(name) for name in example.positives]
        never = {*right, *(names.index(name) for name in example.exclude)}
        lists = []
        for searched in searches.values():
            scores = passages @ searched[number]
            bar = min(scores[right])
            best = [row for row in np.argsort(-scores) if row not in never][:20]
            lists.append(
                [
                    row
                    if scores[row] <= bar - 0.1 * abs(bar) and max(passages[right] @ passages[row]) <= 0.9
                    else None
                    for row in best
                ]
            )
        expected: list[int] = []
        for rank in zip(*lists, strict=True):
            expected += [row for row in dict.fromkeys(rank) if row is not None and row not in expected]
        expected = expected[:5]
        assert found[number].tolist() == expected + [-1] * (5 - len(expected))


@pytest.mark.parametrize("count", [0, 11])
def test_how_many(tmp_path: Path, count: int) -> None:
    data = circle(tmp_path, {"right": 0.0, "other": 90.0}, Example("1", (), "query", ("right",)))
    with pytest.raises(ValueError, match="1 to 10"):
        mine_negatives(searches_of(data, data.splits["train"]), data, data.splits["train"], count=count)


def test_turns_that_are_passages(tmp_path: Path) -> None:
    """Not a turn that is a right answer or excluded, nor one that is no passage."""
    names = ("right", "seen", "turn", "other")
    example = Example("1", ("turn", "words"), "query", ("right",), exclude=("seen",))
    another = Example("2", ("right", "seen", "other"), "query", ("right",), exclude=("seen",))
    dataset = Dataset(tuple(Passage(name, name) for name in names), {"train": (example, another)})
    points = {name: on_circle(at) for at, name in enumerate((*names, "words", "query"))}
    data = embedded(tmp_path, dataset, points)
    rows = context_negatives(data, data.splits["train"])
    assert rows.tolist() == [[2, -1, -1], [-1, -1, 3]]

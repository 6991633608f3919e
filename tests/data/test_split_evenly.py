"""One split dealt out to three: nothing in common between them, clusters spread evenly."""

from pathlib import Path

import numpy as np
import pytest

from prime_jax.data.records import Dataset, Example, Passage, load_dataset, write_dataset
from prime_jax.data.split_evenly import split_evenly, write_splits
from prime_jax.errors import ConfigError, DataError

SHARES = (0.8, 0.1, 0.1)


def talks(count: int = 200) -> tuple[list[Example], np.ndarray]:
    """Conversations of one to four questions with a label each; conversations 3k and 3k+1 share a phrase."""
    random = np.random.default_rng(0)
    examples, labels = [], []
    for talk in range(count):
        label = int(random.choice(5, p=[0.5, 0.2, 0.15, 0.1, 0.05]))
        for turn in range(1 + talk % 4):
            said = tuple(f"talk {talk} turn {earlier}" for earlier in range(turn))
            phrase = (f"phrase {talk // 3}",) if talk % 3 < 2 and turn == 0 else ()
            examples.append(Example(f"{talk}-{turn}", phrase + said, f"talk {talk} turn {turn}", ("p",)))
            labels.append(label)
    return examples, np.array(labels, np.int32)


def texts(examples: tuple[Example, ...]) -> set[str]:
    return {text for one in examples for text in (*one.context, one.query)}


def test_no_text_in_two_splits_and_labels_in_proportion() -> None:
    examples, labels = talks()
    splits = split_evenly(examples, labels, SHARES, seed=0)
    assert sum(map(len, splits.values())) == len(examples)
    named = {name: texts(some) for name, some in splits.items()}
    assert not named["train"] & named["dev"]
    assert not named["train"] & named["test"]
    assert not named["dev"] & named["test"]
    label_of = {example.id: label for example, label in zip(examples, labels.tolist(), strict=True)}
    for (name, some), share in zip(splits.items(), SHARES, strict=True):
        counts = np.bincount([label_of[one.id] for one in some], minlength=5)
        assert np.abs(counts - share * np.bincount(labels)).max() <= 4, name
        assert [one.id for one in some] == [one.id for one in examples if one in some]


def test_the_seed_decides() -> None:
    examples, labels = talks()
    one, same, other = (split_evenly(examples, labels, SHARES, seed=seed) for seed in (0, 0, 1))
    assert one == same
    assert one != other


def test_repeated_ids_stay_in_train() -> None:
    """Only train may name one id twice; so often that chance would put some elsewhere."""
    examples = [
        Example(f"{number}" if number % 10 else "again", (), f"question {number}", ("p",))
        for number in range(200)
    ]
    splits = split_evenly(examples, np.zeros(200, np.int32), SHARES, seed=0)
    assert sum(one.id == "again" for one in splits["train"]) == 20
    assert [len(some) for some in splits.values()] == [160, 20, 20]


@pytest.mark.parametrize("shares", [(0.8, 0.2), (0.8, 0.2, 0.0), (0.5, 0.1, 0.1)])
def test_shares_that_are_none(shares: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="three positive numbers with the sum 1"):
        split_evenly(*talks(20), shares, seed=0)


def test_an_empty_split_is_refused() -> None:
    examples = [Example(f"{number}", ("hello",), f"question {number}", ("p",)) for number in range(9)]
    with pytest.raises(DataError, match="would be empty: 9 examples are in 1 groups"):
        split_evenly(examples, np.zeros(9, np.int32), SHARES, seed=0)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    examples, labels = talks(60)
    examples[0] = Example(**{**vars_of(examples[0]), "extra": {"source": "here"}})
    whole = Dataset((Passage("p", "text"),), {"train": tuple(examples)})
    write_dataset(tmp_path / "from", whole)
    dealt = Dataset(whole.corpus, split_evenly(examples, labels, SHARES, seed=0))
    write_splits(tmp_path / "to", tmp_path / "from", dealt)
    assert load_dataset(tmp_path / "to") == dealt
    assert (tmp_path / "to/corpus.jsonl").samefile(tmp_path / "from/corpus.jsonl")
    with pytest.raises(DataError, match="is there already"):
        write_splits(tmp_path / "to", tmp_path / "from", dealt)
    (tmp_path / "from/corpus.jsonl").unlink()
    write_dataset(tmp_path / "from", Dataset((Passage("p", "other"),), {"train": tuple(examples)}))
    with pytest.raises(DataError, match="is not what is read back"):
        write_splits(tmp_path / "new", tmp_path / "from", dealt)
    assert not (tmp_path / "new").exists()


def vars_of(example: Example) -> dict[str, object]:
    return {name: getattr(example, name) for name in example.__slots__}

from itertools import islice

import numpy as np
import pytest

from prime_jax.data.embedded import EmbeddedDataset, embed_dataset
from prime_jax.data.pipeline import TrainingBatches, steps_per_epoch
from prime_jax.data.records import Dataset, Example, Passage
from prime_jax.data.store import EmbeddingStore
from prime_jax.errors import DataError
from prime_jax.types import Batch

EXAMPLES = 23
# Example i has the query "q<i>", i % 4 turns, and the passage i as positive; example 0 has three positives.
DATASET = Dataset(
    corpus=tuple(Passage(f"p{i}", f"passage {i}") for i in range(EXAMPLES)),
    splits={
        "train": tuple(
            Example(
                f"e{i}",
                tuple(f"turn {i} {at}" for at in range(i % 4)),
                f"query {i}",
                ("p0", "p7", "p9") if i == 0 else (f"p{i}",),
                negatives=("p1", "p2", "p3") if i == 5 else ("p4",) if i == 6 else (),
            )
            for i in range(EXAMPLES)
        )
    },
)
ROWS = EXAMPLES + 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> EmbeddedDataset:
    texts = [passage.text for passage in DATASET.corpus]
    texts += [text for example in DATASET.splits["train"] for text in (*example.context, example.query)]
    store = EmbeddingStore.open(tmp_path_factory.mktemp("store"), "random", 4)
    vectors = np.random.default_rng(0).normal(size=(len(texts), 4)).astype(np.float32)
    store.add(texts[:30], vectors[:30])
    store.add(texts[30:], vectors[30:])
    return embed_dataset(DATASET, store, max_context_length=3)


def pairs(batches: list[Batch]) -> list[tuple[int, int]]:
    """(example, target) of every row."""
    return [pair for b in batches for pair in zip(b.example.tolist(), b.target_id.tolist(), strict=True)]


def epochs(data: EmbeddedDataset, count: int, seed: int = 0, size: int = 6) -> list[list[tuple[int, int]]]:
    batches = list(TrainingBatches(data, "train", batch_size=size, seed=seed, epochs=count))
    steps = len(batches) // count
    return [pairs(batches[at : at + steps]) for at in range(0, len(batches), steps)]


def same(one: Batch, other: Batch) -> bool:
    return all(
        (a is None and b is None) or (a.dtype == b.dtype and np.array_equal(a, b))
        for a, b in zip(one, other, strict=True)
    )


def test_every_field_is_the_text_it_stands_for(data: EmbeddedDataset) -> None:
    examples, store = DATASET.splits["train"], data.store

    def vector(text: str) -> np.ndarray:
        return store[store.rows([text])][0]

    seen = 0
    for batch in TrainingBatches(data, "train", batch_size=5, seed=1, epochs=1, num_negatives=2):
        assert batch.negatives is not None
        assert batch.negative_ids is not None
        for row, number in enumerate(batch.example):
            example = examples[number]
            turns = len(example.context)
            np.testing.assert_array_equal(batch.query[row], vector(example.query))
            np.testing.assert_array_equal(batch.context_mask[row], np.arange(3) < turns)
            for at, turn in enumerate(example.context):
                np.testing.assert_array_equal(batch.context[row, at], vector(turn))
            assert not batch.context[row, turns:].any()
            np.testing.assert_array_equal(batch.target[row], vector(f"passage {batch.target_id[row]}"))
            positives = [int(name[1:]) for name in example.positives]
            assert batch.positive_ids[row].tolist() == positives + [-1] * (3 - len(positives))
            assert batch.target_id[row] in positives
            negatives = [int(name[1:]) for name in example.negatives[:2]]
            assert batch.negative_ids[row].tolist() == negatives + [-1] * (2 - len(negatives))
            for at, negative in enumerate(negatives):
                np.testing.assert_array_equal(batch.negatives[row, at], vector(f"passage {negative}"))
            assert not batch.negatives[row, len(negatives) :].any()
            seen += 1
    assert seen == ROWS


def test_an_epoch_has_every_pair_once_less_the_last_partial_batch(data: EmbeddedDataset) -> None:
    whole = {(0, 0), (0, 7), (0, 9)} | {(i, i) for i in range(1, EXAMPLES)}
    (rows,) = epochs(data, 1, size=5)
    assert len(rows) == ROWS
    assert set(rows) == whole
    for rows in epochs(data, 3, size=6):
        assert len(rows) == len(set(rows)) == 24
        assert set(rows) < whole
    assert steps_per_epoch(data, "train", batch_size=6) == 4
    assert steps_per_epoch(data, "train", batch_size=25) == 1


def test_the_order_follows_the_seed_and_differs_in_every_epoch(data: EmbeddedDataset) -> None:
    first, second, third = epochs(data, 3)
    assert [first, second, third] == epochs(data, 3)
    assert first != second != third != first
    other = epochs(data, 3, seed=1)
    assert not any(rows in other for rows in (first, second, third))
    assert epochs(data, 1, seed=2**40) != epochs(data, 1)


def test_the_pairs_left_out_are_other_ones_each_time(data: EmbeddedDataset) -> None:
    left_out = [set(range(1, EXAMPLES)) - {example for example, _ in rows} for rows in epochs(data, 20)]
    assert len(set().union(*left_out)) > 5


def test_processes_share_each_batch_without_overlap(data: EmbeddedDataset) -> None:
    def stream(index: int, count: int) -> list[Batch]:
        return list(
            TrainingBatches(
                data,
                "train",
                batch_size=6,
                seed=3,
                epochs=2,
                process_index=index,
                process_count=count,
            )
        )

    alone, shares = stream(0, 1), [stream(index, 3) for index in range(3)]
    assert len(alone) == 8
    for whole, *parts in zip(alone, *shares, strict=True):
        assert [len(part.query) for part in parts] == [2, 2, 2]
        assert pairs([whole]) == pairs(parts)  # put together in the order of one process


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 7, 9])
def test_a_restored_stream_goes_on_exactly_where_it_stopped(data: EmbeddedDataset, stop: int) -> None:
    def stream() -> TrainingBatches:
        return TrainingBatches(data, "train", batch_size=6, seed=0, epochs=None, num_negatives=1)

    expected = list(islice(stream(), 12))
    first = stream()
    for _ in range(stop):
        next(first)
    assert first.place == stop
    second = stream()
    second.seek(stop)
    assert all(map(same, islice(second, 12 - stop), expected[stop:]))
    assert same(next(first), expected[stop])


def test_batches_that_cannot_be_made_are_refused(data: EmbeddedDataset) -> None:
    with pytest.raises(DataError, match=r"'train' has 25 pairs .* fewer than the 26 of one batch"):
        TrainingBatches(data, "train", batch_size=26, seed=0, epochs=1)
    with pytest.raises(DataError, match="6 rows cannot be shared equally by 4"):
        TrainingBatches(data, "train", batch_size=6, seed=0, epochs=1, process_count=4)
    without = embed_dataset(
        Dataset(DATASET.corpus, {"train": DATASET.splits["train"][:5]}), data.store, max_context_length=3
    )
    with pytest.raises(
        DataError, match="2 negatives per row are asked for, but the split 'train' names none"
    ):
        TrainingBatches(without, "train", batch_size=2, seed=0, epochs=1, num_negatives=2)


def test_a_place_in_the_stream_names_its_examples(data: EmbeddedDataset) -> None:
    stream = TrainingBatches(data, "train", batch_size=6, seed=0)
    names = [example.id for example in DATASET.splits["train"]]
    for place, batch in enumerate(islice(stream, 10)):
        assert stream.examples_of(place) == [names[row] for row in batch.example]


def test_more_negatives_from_the_next_batch_on_and_none_twice(data: EmbeddedDataset) -> None:
    stream = TrainingBatches(data, "train", batch_size=6, seed=0, num_negatives=2)
    before = next(stream)
    assert before.negative_ids is not None
    assert before.negative_ids.shape == (6, 2)
    more = np.tile(np.array([3, 3, -1, 5]), (EXAMPLES, 1))
    stream.add_negatives(more)
    after = next(stream)
    assert after.negative_ids is not None
    assert after.negatives is not None
    for given, row in zip(stream._given[after.example], after.negative_ids, strict=True):
        real = [name for name in row if name >= 0]
        assert len(real) == len(set(real))
        assert set(real) == ({*given.tolist(), 3, 5} - {-1})
    assert not after.negatives[after.negative_ids < 0].any()
    np.testing.assert_array_equal(after.example, pairs_of_place(data, 1))


def pairs_of_place(data: EmbeddedDataset, place: int) -> np.ndarray:
    stream = TrainingBatches(data, "train", batch_size=6, seed=0)
    return next(islice(stream, place, None)).example


def test_a_row_per_example_with_all_its_right_answers(data: EmbeddedDataset) -> None:
    assert steps_per_epoch(data, "train", batch_size=EXAMPLES, positives="all") == 1
    batch = next(TrainingBatches(data, "train", batch_size=EXAMPLES, seed=0, positives="all"))
    assert sorted(batch.example.tolist()) == list(range(EXAMPLES))
    assert batch.positives is not None
    corpus = data.corpus()
    for row in range(EXAMPLES):
        for at, number in enumerate(batch.positive_ids[row]):
            expected = np.zeros(4) if number < 0 else corpus[number]
            np.testing.assert_array_equal(batch.positives[row, at], expected)

"""Batches for training: a deterministic, sharded, checkpointable stream of embeddings, built on grain.

Order depends on the seed, the epoch and the number of rows only. Every process reads its own share of each
batch, so the batch as a whole is the same however many processes there are.
"""

from collections.abc import Sequence
from typing import Any, Literal

import grain
import numpy as np
from jaxtyping import Float32, Int64

from prime_jax.data.curriculum import SteeredRows
from prime_jax.data.embedded import EMPTY, EmbeddedDataset, gather
from prime_jax.data.sequences import PackedBatches
from prime_jax.data.tokens import TokenTable
from prime_jax.errors import DataError
from prime_jax.types import Batch, BatchTexts

Rows = Int64[np.ndarray, " n"]
Positives = Literal["one", "all"]
PREFETCHED = 2  # batches read ahead by one thread; reading them is much faster than a step


def steps_per_epoch(
    data: EmbeddedDataset, split: str, *, batch_size: int, positives: Positives = "one"
) -> int:
    """Whole batches in one epoch; a row is an (example, positive) pair, or an example with all its positives.

    The rows that are left over after the last whole batch are dropped, other ones in every epoch.

    Raises:
        DataError: If the split does not fill one batch.
    """
    rows = len(_rows(data, split, positives)[0])
    if rows < batch_size:
        raise DataError(
            f"the split '{split}' has {rows} pairs of an example and its positive, fewer than the "
            f"{batch_size} of one batch; lower train.batch_size"
        )
    return rows // batch_size


class TrainingBatches:
    """Shuffled batches of one split, as numpy arrays; iterate over it.

    Args:
        data: The embedded data.
        split: Which split.
        batch_size: Rows of a batch over all processes.
        seed: Seed of the order, which differs in every epoch.
        epochs: Passes over the split; None never ends.
        process_index: Which share of each batch to read: the rows `index * B / count` and on.
        process_count: How many processes share a batch.
        num_negatives: K, the explicit negatives per row, the first K the example names; slots that an example
            cannot fill are zero with the id -1.
        positives: A row per right answer ("one"), or a row per example with all of them ("all").
        steering: Takes the place of the turns, with `positives` "one"; `data` is then its own.
        tokens: Of every text, so that batches bring their texts along; None leaves them out.
        conversations: Of the split, for a model that reads text; None leaves them out.

    Attributes:
        place: How many batches were read.

    Raises:
        DataError: If the split does not fill one batch, processes cannot share a batch equally, or negatives
            are asked for and no example names one.
    """

    def __init__(
        self,
        data: EmbeddedDataset,
        split: str,
        *,
        batch_size: int,
        seed: int,
        epochs: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
        num_negatives: int = 0,
        positives: Positives = "one",
        steering: SteeredRows | None = None,
        tokens: TokenTable | None = None,
        conversations: PackedBatches | None = None,
    ):
        steps = steps_per_epoch(data, split, batch_size=batch_size, positives=positives)
        if batch_size % process_count:
            raise DataError(
                f"a batch of {batch_size} rows cannot be shared equally by {process_count} processes"
            )
        examples = data.splits[split]
        if num_negatives and not any(map(len, examples.negatives)):
            raise DataError(
                f"{num_negatives} negatives per row are asked for, but the split '{split}' names none"
            )
        self.place = 0
        self._data, self._examples, self._positives, self._tokens = data, examples, positives, tokens
        self._steering, self._seed, self._steps, self._batch_size = steering, seed, steps, batch_size
        self._conversations, self._process = conversations, (process_index, process_count)
        self._example_of, self._target_of = _rows(data, split, positives)
        rights = examples.positives if steering is None else steering.rights()
        self._right = _padded(rights, max(map(len, rights)))
        self._given = _padded([ids[:num_negatives] for ids in examples.negatives], num_negatives)
        self._negatives = self._given
        share = batch_size // process_count
        mine = slice(process_index * share, (process_index + 1) * share)
        # Grain adds the epoch to the seed; spreading the seeds keeps neighbouring ones from sharing orders.
        spread = int(np.random.SeedSequence(seed).generate_state(1)[0])
        shuffled = grain.MapDataset.range(len(self._example_of)).shuffle(seed=spread)
        self._order = shuffled[: steps * batch_size].batch(batch_size, batch_fn=np.array).repeat(epochs)
        self._batches = self._order.map_with_index(lambda place, rows: self._read(rows, place, mine))
        self._stream = self._from(0)

    def __iter__(self) -> "TrainingBatches":
        return self

    def __next__(self) -> Batch:
        batch: Batch = next(self._stream)
        self.place += 1
        return batch

    def seek(self, place: int) -> None:
        """Go on with batch number `place`, counted from the first of all epochs."""
        self.place = place
        self._stream = self._from(place)

    def coming(self, count: int) -> list[Batch]:
        """The next batches, read beside the stream: where it stands, and what it read ahead, stays."""
        return [self._batches[self.place + ahead] for ahead in range(count)]

    def add_negatives(self, table: Int64[np.ndarray, "n more"]) -> None:
        """From the next batch on, give each example these corpus rows (-1: none) besides those it names.

        A passage that stands in a row twice is one negative; an earlier table is replaced.
        """
        self._negatives = _without_repeats(np.concatenate([self._given, table], axis=1))
        self.seek(self.place)  # what was read ahead had the old ones

    def examples_of(self, place: int) -> list[str]:
        """Ids of the examples in batch number `place`, of all processes."""
        rows = self._order[place]
        return [self._examples.ids[example] for example in self._example_of[rows]]

    def _from(self, place: int) -> grain.DatasetIterator[Batch]:
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCHED)
        stream: grain.DatasetIterator[Batch] = iter(self._batches.to_iter_dataset(options))
        stream.set_state({"next_index": place})
        return stream

    def _read(self, whole: Rows, place: int, mine: slice) -> Batch:
        """This process's rows of a batch; every field is one gather."""
        rows = whole[mine]
        data, examples, steering = self._data, self._examples, self._steering
        example, target = self._example_of[rows], self._target_of[rows]
        turns, negatives, more = examples.context_rows[example], self._negatives[example], {}
        if steering is not None:
            epoch = place / self._steps
            drawn = steering.curriculum.draw(place, self._batch_size, seed=self._seed, epoch=epoch)[mine]
            turns = steering.turns(rows, drawn)
            drawn = np.where(turns[:, 0] == EMPTY, 0, drawn)  # a question without keywords goes unsteered
            negatives = _without_repeats(np.concatenate([negatives, steering.negatives(rows)], axis=1))
            more = {"cluster": steering.clusters(rows), "steering": drawn}
        context, mask = gather(data.store, turns)
        fields: dict[str, Any] = {
            "context": context,
            "context_mask": mask,
            "query": data.store[examples.query_rows[example]],
            "target": data.store[data.corpus_rows[target]],
            "target_id": target,
            "positive_ids": self._right[example],
            "example": example,
            **more,
        }
        if self._positives == "all":
            fields["positives"] = self._passages(fields["positive_ids"])
        if negatives.shape[1]:
            fields["negative_ids"] = negatives
            fields["negatives"] = self._passages(fields["negative_ids"])
        if self._tokens is not None:
            fields["texts"] = self._texts(self._tokens, whole, mine)
        if self._conversations is not None:
            fields["conversations"] = self._conversations(self._example_of[whole], *self._process)
        return Batch(**fields)

    def _texts(self, table: TokenTable, whole: Rows, mine: slice) -> BatchTexts:
        """The texts of a batch, padded to a length that all processes agree on."""
        examples, example = self._examples, self._example_of[whole]
        asked = np.concatenate(
            [examples.context_rows[example], examples.query_rows[example][:, None]], axis=1
        )
        passage = self._data.corpus_rows[self._target_of[whole]]
        width = table.width(asked, passage)
        return BatchTexts(table.padded(asked[mine], width), table.padded(passage[mine], width))

    def _passages(self, ids: Int64[np.ndarray, "n K"]) -> Float32[np.ndarray, "n K E"]:
        corpus_rows = self._data.corpus_rows
        return gather(self._data.store, np.where(ids == EMPTY, EMPTY, corpus_rows[ids]))[0]


def _rows(data: EmbeddedDataset, split: str, positives: Positives) -> tuple[Rows, Rows]:
    """Example and target of every row that an epoch may have."""
    right = data.splits[split].positives
    if positives == "all":
        return np.arange(len(right)), np.array([ids[0] for ids in right], np.int64)
    return np.repeat(np.arange(len(right)), [len(ids) for ids in right]), np.concatenate(right)


def _without_repeats(table: Int64[np.ndarray, "n K"]) -> Int64[np.ndarray, "n K"]:
    """The table with every id but its first appearance in a row replaced by -1."""
    order = np.argsort(table, axis=1, kind="stable")
    ordered = np.take_along_axis(table, order, axis=1)
    repeated = np.zeros(table.shape, bool)
    np.put_along_axis(repeated, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return np.where(repeated, EMPTY, table)


def _padded(lists: Sequence[Int64[np.ndarray, " _"]], width: int) -> Int64[np.ndarray, "n width"]:
    """Lists of ids as one array, -1 at the end of the shorter ones."""
    table = np.full((len(lists), width), EMPTY, np.int64)
    for number, ids in enumerate(lists):
        table[number, : len(ids)] = ids
    return table

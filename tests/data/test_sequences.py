"""Packing: every sequence is somewhere whole, rows stay within their room, few shapes occur."""

import numpy as np
import pytest

from prime_jax.data.sequences import PackedBatches, Sequences, packed, packed_into, room_for, width_for
from prime_jax.types import SEQUENCES_PER_ROW, Conversations

MOST = 48


def some(count: int, seed: int = 0, longest: int = MOST) -> Sequences:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, count)
    return Sequences.of([rng.integers(1, 1000, length).astype(np.int32) for length in lengths])


def read(found: Conversations, row: int) -> list[int]:
    """The tokens of example `row`, wherever they lie."""
    tokens, segments, positions, slots = map(np.asarray, found)
    at, number = divmod(int(slots[row]), SEQUENCES_PER_ROW)
    mine = segments[at] == number + 1
    assert positions[at][mine].tolist() == list(range(mine.sum()))
    assert np.all(np.diff(np.flatnonzero(mine)) == 1)
    return list(tokens[at][mine])


def content(sequences: Sequences, row: int) -> list[int]:
    return list(sequences.tokens[sequences.starts[row] : sequences.starts[row + 1]])


def test_every_sequence_is_there_once() -> None:
    sequences = some(40)
    chosen = np.random.default_rng(1).permutation(40)[:30]
    found = packed(sequences, chosen, room_for(sequences.lengths[chosen], most=MOST))
    for row, number in enumerate(chosen):
        assert read(found, row) == content(sequences, int(number))
    assert np.count_nonzero(found.segments) == sequences.lengths[chosen].sum()
    assert len(np.unique(found.slots)) == 30


def test_many_short_sequences_share_rows_up_to_a_number() -> None:
    sequences = Sequences.of([np.array([7, 8], np.int32)] * 20)
    found = packed_into(sequences, np.arange(20), width=MOST, multiple=1)
    assert found.tokens.shape == (-(-20 // SEQUENCES_PER_ROW), MOST)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize("shares", [1, 2])
def test_shares_and_micro_batches_fit_together(shares: int, micro_batches: int) -> None:
    """What `one_turn` takes of the whole batch is a packed batch of those rows."""
    sequences, chosen = some(16, seed=3), np.arange(16)
    pack = PackedBatches(sequences, MOST, micro_batches, devices=2)
    parts = [pack(chosen, process, shares) for process in range(shares)]
    whole = Conversations(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))
    for number in range(micro_batches):
        rows = slice(number, None, micro_batches)
        micro = Conversations(*(field[rows] for field in whole))
        for place, row in enumerate(chosen[rows]):
            assert read(micro, place) == content(sequences, int(row))
        assert len(micro.tokens) % (2 * shares) == 0  # two devices of every process


def test_few_shapes_occur() -> None:
    sequences = some(4000, seed=5)
    rng = np.random.default_rng(0)
    pack = PackedBatches(sequences, MOST)
    shapes = {pack(rng.permutation(4000)[:64], 0, 1).tokens.shape for _ in range(40)}
    assert len(shapes) <= 4
    assert all(rows % 8 == 0 and width in (32, 48) for rows, width in shapes)


def test_widths() -> None:
    assert [width_for(longest, 96) for longest in (3, 32, 33, 64, 65, 96)] == [32, 32, 64, 64, 96, 96]
    assert width_for(90, 90) == 90

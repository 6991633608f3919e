"""Sequences of token ids, several packed into a row, so that little is computed on padding.

Sequences in one row do not see one another (`prime_jax.types.Conversations`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from prime_jax.types import SEQUENCES_PER_ROW, Conversations

WIDTHS = (32, 64, 96, 128, 192, 256, 384, 512)
"""Lengths of packed rows; a batch takes the shortest that holds its longest sequence."""
STEPS = 8  # different numbers of packed rows per batch, at most: for each one that occurs a step is compiled

Tokens = Int32[np.ndarray, " _"]


@dataclass(frozen=True)
class Sequences:
    """n sequences of token ids, one behind the other.

    Attributes:
        tokens: All of them.
        starts: Where each begins, and where the last ends, `[n + 1]`.
    """

    tokens: Tokens
    starts: Int64[np.ndarray, " n_plus_1"]

    @classmethod
    def of(cls, sequences: Sequence[Tokens]) -> "Sequences":
        """Put arrays together."""
        ends = np.cumsum([len(one) for one in sequences], dtype=np.int64)
        return cls(np.concatenate([np.zeros(0, np.int32), *sequences]), np.concatenate([[0], ends]))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Int64[np.ndarray, " n"]:
        """Tokens of each."""
        return np.diff(self.starts)

    def padded(self, chosen: Int64[np.ndarray, " B"], width: int) -> Int32[np.ndarray, "B width"]:
        """Some of them, one to a row, zeros behind."""
        lengths, places = self.lengths[chosen][:, None], np.arange(width)
        real = places < lengths
        found: Int32[np.ndarray, "B width"] = self.tokens[
            np.where(real, self.starts[chosen][:, None] + places, 0)
        ]
        return np.where(real, found, 0)


def width_for(longest: int, most: int) -> int:
    """The length of packed rows that hold sequences of up to `longest` tokens; `most` is the model's."""
    return next(width for width in (*(width for width in WIDTHS if width < most), most) if width >= longest)


class Room(NamedTuple):
    """How much is packed into: rows of one process and micro-batch, and tokens of a row."""

    rows: int
    width: int


def room_for(
    lengths: Int64[np.ndarray, " B"], *, most: int, shares: int = 1, micro_batches: int = 1, devices: int = 1
) -> Room:
    """The room that every process needs for its share of a batch, one of few sizes.

    Args:
        lengths: Tokens of the sequences of the whole batch.
        most: Tokens of the longest sequence that there may be.
        shares: Processes that share the batch, in equal parts one after the other.
        micro_batches: Into how many of them a process splits its share: row i goes into number i modulo that.
        devices: Devices of a process, among which the packed rows come out even.
    """
    width = width_for(int(lengths.max(initial=1)), most)
    parts = [
        part[number::micro_batches] for part in np.split(lengths, shares) for number in range(micro_batches)
    ]
    needed = max(int(_places(part, width)[0].max(initial=0)) + 1 for part in parts)
    step = -(-len(parts[0]) // STEPS)
    step = -(-step // devices) * devices
    return Room(-(-needed // step) * step, width)


def packed(
    sequences: Sequences,
    chosen: Int64[np.ndarray, " B"],
    room: Room,
    *,
    micro_batches: int = 1,
    share: int = 0,
) -> Conversations:
    """Put sequences into rows.

    Args:
        sequences: All there are.
        chosen: Which of them, this process's.
        room: As `room_for` gave it for the whole batch.
        micro_batches: As there. Packed row r belongs to number r modulo that.
        share: Number of this process.
    """
    rows = room.rows * micro_batches
    tokens, positions, segments = (np.zeros((rows, room.width), np.int32) for _ in range(3))
    slots = np.zeros(len(chosen), np.int32)
    lengths = sequences.lengths[chosen]
    for number in range(micro_batches):
        members = np.arange(number, len(chosen), micro_batches)
        row, slot, start = _places(lengths[members], room.width)
        slots[members] = (share * room.rows + row) * SEQUENCES_PER_ROW + slot
        for member, at, place, first in zip(members, row, slot, start, strict=True):
            length, source = int(lengths[member]), int(sequences.starts[chosen[member]])
            where = (at * micro_batches + number, slice(first, first + length))
            tokens[where] = sequences.tokens[source : source + length]
            positions[where] = np.arange(length)
            segments[where] = place + 1
    fields: dict[str, Any] = {
        "tokens": tokens,
        "segments": segments,
        "positions": positions,
        "slots": slots,
    }
    return Conversations(**fields)


def packed_into(
    sequences: Sequences, chosen: Int64[np.ndarray, " B"], *, width: int, multiple: int
) -> Conversations:
    """Put sequences into as few rows of `width` tokens as a multiple of some number allows."""
    needed = int(_places(sequences.lengths[chosen], width)[0].max(initial=0)) + 1
    return packed(sequences, chosen, Room(-(-needed // multiple) * multiple, width))


@dataclass(frozen=True)
class PackedBatches:
    """Packs each batch of a split.

    Attributes:
        sequences: Of the split's examples.
        most: Tokens of the longest sequence that there may be.
        micro_batches: Into how many of them a process's share of a batch is split.
        devices: Devices of a process.
    """

    sequences: Sequences
    most: int
    micro_batches: int = 1
    devices: int = 1

    def __call__(self, examples: Int64[np.ndarray, " B"], process: int, processes: int) -> Conversations:
        """The conversations of one process's share of a whole batch's examples."""
        split = {"micro_batches": self.micro_batches}
        lengths = self.sequences.lengths[examples]
        room = room_for(lengths, most=self.most, shares=processes, devices=self.devices, **split)
        mine = np.split(examples, processes)[process]
        return packed(self.sequences, mine, room, share=process, **split)


def _places(lengths: Int64[np.ndarray, " B"], width: int) -> tuple[Int64[np.ndarray, " B"], ...]:
    """Row, number within the row and first token of each sequence: first fit, the longest ones first."""
    used = np.zeros(len(lengths), np.int64)
    count = np.zeros(len(lengths), np.int64)
    row, slot, start = (np.zeros(len(lengths), np.int64) for _ in range(3))
    for index in np.argsort(-lengths, kind="stable"):
        fits = (used + lengths[index] <= width) & (count < SEQUENCES_PER_ROW)
        at = int(np.argmax(fits))
        row[index], slot[index], start[index] = at, count[at], used[at]
        used[at] += lengths[index]
        count[at] += 1
    return row, slot, start

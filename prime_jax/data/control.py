"""A control set: part of the training data, set aside by whole conversations and never trained on."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from prime_jax.data.embedded import EmbeddedDataset, EmbeddedSplit
from prime_jax.errors import DataError
from prime_jax.retrieval.groups import linked
from prime_jax.types import Batch

CONTROL = "control"
COMPANY = 256  # passages lent to a control batch, at most: it holds a copy for every row


def with_control(
    data: EmbeddedDataset, batches: int, rows: int, *, share: float, seed: int, all_positives: bool
) -> EmbeddedDataset:
    """Move whole conversations (or documents) from "train" to a new split "control".

    Examples belong together when they share a turn or a query, directly or through others. Conversations
    come in a random order, and those stay in training that are larger than what is still missing. Where the
    rest of them does not fill the last place, the smallest one that does closes it.

    Args:
        data: With the split "train".
        batches: Control batches.
        rows: Rows of one of them.
        share: Most of the training rows that may be set aside.
        seed: Of the choice.
        all_positives: Whether an example is one row, or one for each of its right answers.

    Raises:
        DataError: If that takes more than `share`, or all that is in one conversation.
    """
    train = data.splits["train"]
    groups = conversations(data)
    count = np.array([1 if all_positives else len(ids) for ids in train.positives])
    sizes = np.bincount(groups, weights=count).astype(np.int64)
    whole, needed = int(count.sum()), batches * rows
    chosen = _chosen(sizes, needed, np.random.default_rng(seed))
    found = int(sizes[chosen].sum())
    if needed > share * whole or found > share * whole:
        fitting = int(share * whole) // batches
        raise DataError(
            f"hybrid sets {batches} control batches of {rows} rows aside, {needed} in all; in whole "
            f"conversations that takes {found} of the {whole} rows of 'train' (the largest of {len(sizes)} "
            f"conversations has {sizes.max()}), and hybrid.control_share {share:g} allows "
            f"{int(share * whole)}; {_advice(batches, rows, fitting)}"
        )
    aside = chosen[groups]
    splits = {"train": part_of(train, ~aside), CONTROL: part_of(train, aside)}
    return replace(data, splits={**data.splits, **splits})


def _chosen(
    sizes: Int64[np.ndarray, " g"], needed: int, random: np.random.Generator
) -> Bool[np.ndarray, " g"]:
    """Which conversations make up `needed` rows, with less beyond than one of those left has."""
    chosen, missing = np.zeros(len(sizes), bool), needed
    for group in random.permutation(len(sizes)):
        if sizes[group] <= missing:
            chosen[group] = True
            missing -= int(sizes[group])
    if missing:  # what is left is larger than that
        chosen[int(np.where(chosen, sizes.max() + 1, sizes).argmin())] = True
    return chosen


def _advice(batches: int, rows: int, fitting: int) -> str:
    """What to lower, and to how much."""
    if 2 <= fitting < rows:
        return f"lower hybrid.control_rows to {fitting}, or raise hybrid.control_share"
    if batches > 8:
        return "lower hybrid.control_batches (8 at least) or hybrid.control_rows, or leave hybrid.enabled off"
    return "there is too little data, or too few conversations, to watch a run: leave hybrid.enabled off"


def conversations(data: EmbeddedDataset) -> Int64[np.ndarray, " n"]:
    """Which training examples belong together, as labels; turns that a search found join nothing."""
    train = data.splits["train"]
    turns = train.context_rows if data.context_from == "data" else train.context_rows[:, :0]
    asked = np.concatenate([turns, train.query_rows[:, None]], axis=1)
    return linked([row[row >= 0].tolist() for row in asked])


def part_of(split: EmbeddedSplit, which: Bool[np.ndarray, " n"]) -> EmbeddedSplit:
    """The examples of a split where `which` is True."""
    places = np.flatnonzero(which)
    parts: dict[str, Any] = {}
    for field in fields(split):
        value = getattr(split, field.name)
        if isinstance(value, tuple):
            parts[field.name] = tuple(value[place] for place in places)
        elif isinstance(value, np.ndarray):
            parts[field.name] = value[places]
    return replace(split, **parts)


def in_company(batches: Sequence[Batch], rows: int) -> list[Batch]:
    """Small batches whose rows are told from as many passages as those of a training batch.

    InfoNCE within few rows asks for something else than training does: what is best among 8 passages need not
    be among 64. So each batch gets the targets of those that follow it as explicit negatives, which cost no
    forward pass: as many as it has rows less than `rows`, at most `COMPANY`, and no more than there are.

    Args:
        batches: Of one size, in host memory.
        rows: Of a training batch.
    """
    targets = np.concatenate([batch.target for batch in batches])
    ids = np.concatenate([batch.target_id for batch in batches])
    size = len(batches[0].query)
    count = max(0, min(rows, len(targets), size + COMPANY) - size)
    if not count:
        return list(batches)
    found = []
    for at, batch in enumerate(batches, start=1):
        others = (at * size + np.arange(count)) % len(targets)
        lent: dict[str, Any] = {
            "negatives": np.tile(targets[others], (size, 1, 1)),
            "negative_ids": np.tile(ids[others], (size, 1)),
        }
        if batch.negatives is not None:
            lent = {name: np.concatenate([getattr(batch, name), more], axis=1) for name, more in lent.items()}
        found.append(batch._replace(**lent))
    return found

"""One split dealt out to train, dev and test: by question and conversation, evenly over clusters."""

import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from prime_jax import files
from prime_jax.data.records import SPLITS, Dataset, Example, as_line, load_dataset
from prime_jax.errors import ConfigError, DataError
from prime_jax.retrieval.groups import linked


def split_evenly(
    examples: Sequence[Example], labels: Int32[np.ndarray, " n"], shares: Sequence[float], *, seed: int
) -> dict[str, tuple[Example, ...]]:
    """Deal examples out so that no question and no turn is in two splits.

    Whole groups of examples that have a question or a turn in common (directly or through others) go to one
    split, the largest group first, each to where it brings the counts of all labels closest to their shares
    (iterative stratification, Sechidis et al. 2011). Groups in which an id is repeated go to train, the only
    split that may repeat one.

    Args:
        examples: What is dealt out; every split keeps their order.
        labels: What is to be spread evenly, such as the cluster of each first right answer.
        shares: Of train, dev and test.
        seed: Of the order among groups of one size.

    Raises:
        ConfigError: If shares are not three positive numbers with the sum 1.
        DataError: If a split would be empty.
    """
    if len(shares) != len(SPLITS) or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise ConfigError(f"--shares is {list(shares)}, it must be three positive numbers with the sum 1")
    groups = linked([(*one.context, one.query, ("id", one.id)) for one in examples])
    sizes = np.bincount(groups)
    counts = np.zeros((len(sizes), int(labels.max()) + 2))  # of each label in each group, and of all
    np.add.at(counts, (groups, labels), 1)
    counts[:, -1] = sizes
    repeated = _repeating(examples, groups, len(sizes))
    wanted = np.asarray(shares)[:, None] * counts.sum(axis=0)
    weight = 1 / np.maximum(wanted, 1e-9)
    held = np.zeros_like(wanted)
    split_of = np.zeros(len(sizes), np.int64)
    shuffled = np.random.default_rng(seed).permutation(len(sizes))
    order = shuffled[np.argsort(-(sizes + repeated * len(examples))[shuffled], kind="stable")]
    for group in order:
        if not repeated[group]:
            off = held - wanted
            split_of[group] = np.argmin((weight * ((off + counts[group]) ** 2 - off**2)).sum(axis=1))
        held[split_of[group]] += counts[group]
    chosen = split_of[groups]
    splits = {
        name: tuple(one for one, own in zip(examples, chosen, strict=True) if own == number)
        for number, name in enumerate(SPLITS)
    }
    for name, some in splits.items():
        if not some:
            raise DataError(
                f"'{name}' would be empty: {len(examples)} examples are in {len(sizes)} groups without a "
                f"common question or turn, the largest of {sizes.max()}"
            )
    return splits


def write_splits(out: Path, source: Path, dataset: Dataset) -> None:
    """Write a data folder with the corpus of `source`, linked where the file system can, and read it back.

    Raises:
        DataError: If `out` is there already, or what was written is not read back the same.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: is there already; remove it or write elsewhere")
    with files.atomic_folder(out) as temporary:
        try:
            os.link(source / "corpus.jsonl", temporary / "corpus.jsonl")
        except OSError:
            shutil.copyfile(source / "corpus.jsonl", temporary / "corpus.jsonl")
        for name, examples in dataset.splits.items():
            with (temporary / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as stream:
                stream.writelines(map(as_line, examples))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about repeated ids: said when the source was read
            written = load_dataset(temporary, SPLITS)
        if written.hash != dataset.hash:
            raise DataError(f"{out}: what was written is not what is read back; did {source} change?")


def _repeating(examples: Sequence[Example], groups: np.ndarray, count: int) -> np.ndarray:
    """Whether each group has an id twice."""
    seen: set[str] = set()
    repeated = np.zeros(count, bool)
    for example, group in zip(examples, groups, strict=True):
        repeated[group] |= example.id in seen
        seen.add(example.id)
    return repeated

"""Is the gain real where dev is small? Train without a fifth of train, judge on that fifth, five times.

    python -m benchmarks.folds --data DIR --out FILE.json [--config FILE ...] [--seeds 0 1 2]
        [--folds 5] [--apart KEY] [--only NAME ...] [--keep DIR]

Rows and options are those of `benchmarks.rivals`. Whole conversations go into a fold. With --apart the values
that records have under that key (entities, documents) are shared out among the folds, too: a fold is judged
on its conversations and on all questions about its own values, and nothing in which one of those occurs is
trained on, so that there are enough questions about what training never saw. A question can then be judged
twice: by models that know what it is about, and by models that do not.

Checkpoints are chosen and baselines tuned on dev, as always, so nothing of a fold has a say in what is judged
on it. Where there are several of our predictors, the row "chosen" takes in each fold the one that is best on
dev. Comparisons are made question by question over all folds together, on whole conversations. The table of
each fold is written to the folder of --keep as its cells end, and the same command goes on from there.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from benchmarks.common import facts
from benchmarks.rivals import PACKAGES, conclusion, filled, in_command, options_of, say, show, stored_in
from benchmarks.rivals_methods import Task
from benchmarks.study import Opened
from prime_jax.data.grouping import conversation_labels
from prime_jax.data.records import Dataset, Example, load_dataset, write_dataset
from prime_jax.errors import DataError
from prime_jax.files import write_json

CHOSEN = "chosen"


def values_of(example: Example, key: str) -> list[str]:
    """What a record has under a key: a list of texts, or one.

    Raises:
        DataError: If it has nothing there, or something else.
    """
    found = example.extra.get(key)
    values = [found] if isinstance(found, str) else found
    if not isinstance(values, list) or not values or not all(isinstance(one, str) for one in values):
        raise DataError(f"--apart {key}: record {example.id!r} has {found!r} there, not a text or some texts")
    return values


def cut(examples: Sequence[Example], folds: int, apart: str | None) -> list[tuple[ndarray, ndarray]]:
    """For each fold, which records are trained on and which are judged, as masks."""
    labels, random = conversation_labels(examples), np.random.default_rng(0)
    of_conversation = (random.permutation(int(labels.max()) + 1) % folds)[labels]
    if apart is None:
        return [(of_conversation != fold, of_conversation == fold) for fold in range(folds)]
    values = [values_of(example, apart) for example in examples]
    names = sorted({value for some in values for value in some})
    of_value = dict(zip(names, (random.permutation(len(names)) % folds).tolist(), strict=True))
    parts = []
    for fold in range(folds):
        own = np.array([[of_value[value] == fold for value in some].count(True) for some in values])
        judged = (of_conversation == fold) | (own == [len(some) for some in values])
        known = ~np.isin(labels, labels[judged]) & (own == 0)
        parts.append((known, judged))
    return parts


def fold_data(dataset: Dataset, known: ndarray, judged: ndarray, out: Path) -> None:
    """Write a data folder in which some records of train are train and some are test, each id once."""
    train = dataset.splits["train"]
    test = {train[row].id: train[row] for row in np.flatnonzero(judged)}
    splits = {
        "train": tuple(train[row] for row in np.flatnonzero(known)),
        "dev": dataset.splits["dev"],
        "test": tuple(test.values()),
    }
    write_dataset(out, Dataset(dataset.corpus, splits))


def together(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One cell of the same method with the same seed in every fold: rankings one after the other."""
    first = cells[0]
    costs = ("train_seconds", "ms", "ms_turns_kept", "mb")
    means = {
        name: None if first[name] is None else float(np.mean([cell[name] for cell in cells]))
        for name in costs
    }
    return {**first, **means, "found": [line for cell in cells for line in cell["found"]]}


def pooled(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The cells of all folds together, by method and seed, with the choice among ours."""
    found = [table["cells"] for table in tables]
    cells = {
        method: {seed: together([one[method][seed] for one in found]) for seed in seeds}
        for method in found[0]
        if (seeds := [seed for seed in found[0][method] if all(seed in one.get(method, ()) for one in found)])
    }
    ours = [method for method, seeds in cells.items() if all(cell["ours"] for cell in seeds.values())]
    if len(ours) < 2:
        return cells
    best = [max(ours, key=lambda method: _on_dev(table["cells"][method])) for table in tables]
    of_fold = [table["cells"][method] for table, method in zip(tables, best, strict=True)]
    seeds = [seed for seed in of_fold[0] if all(seed in one for one in of_fold)]  # a method may have fewer
    picked = {seed: together([one[seed] for one in of_fold]) for seed in seeds}
    for cell in picked.values():
        cell["about"] = {"of_fold": best}
    return {**cells, CHOSEN: picked}


def _on_dev(cells: Mapping[str, Any]) -> float:
    return float(np.mean([cell["about"]["dev_MRR@10"] for cell in cells.values()]))


def all_folds(tasks: Sequence[Task], train: Sequence[Example]) -> Opened:
    """What was judged in all folds, as one split."""
    label = dict(zip((example.id for example in train), conversation_labels(train).tolist(), strict=True))
    first, judged = tasks[0].data, [task.data.judged for task in tasks]
    positives = [answers for split in judged for answers in split.positives]
    return first._replace(
        judged=first.judged._replace(positives=positives),
        fresh=np.concatenate([task.data.fresh for task in tasks]),
        groups=np.array([label[example.id] for task in tasks for example in task.examples]),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the folds lack, and print the table of all of them."""
    parser = options_of(__doc__)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--apart", metavar="KEY", help="whose values training and fold must not share")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="the table of every fold")
    in_command(parser, argv, _run)


def _run(given: argparse.Namespace, words: Sequence[str]) -> None:
    if given.folds < 2:
        raise DataError(f"--folds {given.folds}: there must be two or more")
    dataset = load_dataset(given.data, ("train", "dev"))
    train = dataset.splits["train"]
    tables, tasks = [], []
    with tempfile.TemporaryDirectory() as scratch:
        tables_in = given.keep or Path(scratch)
        for fold, (known, judged) in enumerate(cut(train, given.folds, given.apart)):
            say(f"fold {fold}: {known.sum()} records to train on, {judged.sum()} to judge")
            folder = Path(scratch) / f"fold{fold}"
            fold_data(dataset, known, judged, folder)
            table, task = filled(
                given, stored_in(Path(scratch), words), folder, "test", tables_in / f"fold{fold}.json"
            )
            tables.append(table)
            tasks.append(task)
    cells = pooled(tables)
    result: dict[str, Any] = {
        "set": given.data.resolve().name,
        "folds": given.folds,
        "apart": given.apart,
        "trained_on": [len(task.data.splits["train"].query) for task in tasks],
        "settings": {name: next(iter(seeds.values()))["settings"] for name, seeds in cells.items()},
        **conclusion(cells, all_folds(tasks, train), list(cells)),
        **facts(*PACKAGES),
    }
    if CHOSEN in cells:
        result["chosen_of_fold"] = next(iter(cells[CHOSEN].values()))["about"]["of_fold"]
    write_json(given.out, result)
    show(result)


if __name__ == "__main__":
    main()

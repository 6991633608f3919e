"""`prime-jax combine`: several data folders as one, to train one predictor for conversations of many kinds.

Every set keeps its own passages: they become a scope, so a question searches, and is told from, passages of
its own set alone. Ids get the name of their set in front.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path

from prime_jax.data.grouping import CONVERSATION, some_conversations
from prime_jax.data.records import SPLITS, Dataset, Example, Passage, load_dataset, write_dataset
from prime_jax.errors import DataError, PredictorError
from prime_jax.files import user_path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 on success, 2 for a user's mistake."""
    parser = ArgumentParser("prime-jax combine", description=__doc__, allow_abbrev=False)
    parser.add_argument("sets", type=user_path, nargs="+", metavar="DIR", help="data folders (docs/data.md)")
    parser.add_argument("--out", type=user_path, required=True, metavar="DIR", help="data folder to write")
    parser.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help="about so many examples of each set's train, whole conversations",
    )
    parser.add_argument("--dev-rows", type=int, metavar="N", help="the same of its dev")
    parser.add_argument("--seed", type=int, default=0, help="of which conversations they are (default: 0)")
    given = parser.parse_args(argv)
    try:
        given.out, folders = given.out.resolve(), [folder.resolve() for folder in given.sets]
        if given.out in folders:
            raise DataError(f"{given.out}: is one of the sets, name another folder for the whole")
        most = {"train": given.rows, "dev": given.dev_rows}
        whole = combined(_named(folders), most, seed=given.seed)
        write_dataset(given.out, whole)
    except (PredictorError, OSError) as mistake:
        print(f"prime-jax combine: {mistake}", file=sys.stderr)
        return 2
    for name, examples in whole.splits.items():
        counts = {folder.name: 0 for folder in folders}
        for example in examples:
            counts[example.id.partition("/")[0]] += 1
        print(f"{name:<8}{len(examples):>8,}  " + ", ".join(f"{set_} {n:,}" for set_, n in counts.items()))
    print(f"{'corpus':<8}{len(whole.corpus):>8,}")
    return 0


def combined(
    sets: Mapping[str, Dataset], most: Mapping[str, int | None] | None = None, *, seed: int = 0
) -> Dataset:
    """Several datasets as one; each is a scope of its own, or keeps its scopes within its own.

    Args:
        sets: By the name that stands before their ids.
        most: About how many examples of a split each set gives, whole conversations; None or no entry is all.
        seed: Of which conversations these are.

    Raises:
        DataError: If the sets do not have the same splits, or a number is below 1.
    """
    splits = {name: tuple(one.splits) for name, one in sets.items()}
    if len(set(splits.values())) > 1:
        raise DataError(f"combine: the sets have different splits: {splits}")
    corpus: list[Passage] = []
    examples: dict[str, list[Example]] = {split: [] for split in next(iter(splits.values()))}
    for name, dataset in sets.items():
        corpus += [
            replace(passage, id=f"{name}/{passage.id}", scope=_scope(name, passage.scope))
            for passage in dataset.corpus
        ]
        for split, rows in examples.items():
            kept = _some(dataset.splits[split], (most or {}).get(split), seed)
            rows += [_renamed(example, name) for example in kept]
    return Dataset(tuple(corpus), {split: tuple(rows) for split, rows in examples.items()})


def _named(folders: Sequence[Path]) -> dict[str, Dataset]:
    """The sets by the names of their folders: train and dev of each, and test where all have one."""
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        raise DataError(f"combine: two folders of one name would be one set ({', '.join(names)})")
    without = [folder.name for folder in folders if not (folder / "test.jsonl").is_file()]
    if without and len(without) < len(folders):
        print(f"test is left out: {', '.join(without)} has none", file=sys.stderr)
    splits = ("train", "dev") if without else SPLITS
    return {folder.name: load_dataset(folder, splits) for folder in folders}


def _scope(name: str, scope: str | None) -> str:
    return name if scope is None else f"{name}/{scope}"


def _renamed(example: Example, name: str) -> Example:
    extra = dict(example.extra)
    if CONVERSATION in extra:
        extra[CONVERSATION] = f"{name}/{extra[CONVERSATION]}"
    return replace(
        example,
        id=f"{name}/{example.id}",
        positives=tuple(f"{name}/{one}" for one in example.positives),
        negatives=tuple(f"{name}/{one}" for one in example.negatives),
        exclude=tuple(f"{name}/{one}" for one in example.exclude),
        scope=_scope(name, example.scope),
        extra=extra,
    )


def _some(examples: tuple[Example, ...], most: int | None, seed: int) -> Sequence[Example]:
    """About so many of them: whole conversations in random order until there are enough; in their order."""
    if most is not None and most < 1:
        raise DataError(f"combine: {most} examples of a set are none")
    if most is None or most >= len(examples):
        return examples
    return list(compress(examples, some_conversations(examples, most, seed=seed)))


if __name__ == "__main__":
    sys.exit(main())

"""Turn HotpotQA (Yang et al. 2018) into training data: a multi-hop question and the two passages it needs.

    python train/prepare_hotpotqa.py hotpot_train_v1.1.json hotpot_dev_distractor_v1.json --out DIR

Both files as published (distractor setting). Every paragraph of both is a passage. Train questions become
train and, one in twenty, dev; the published dev questions, whose answers are public, become test. Turns are
empty: train and evaluate with `data.context_from: search`, which takes the passages of a first search as
context.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prime_jax.data.recipe import RecipeWriter, identity_of, records_of, share_of, text_id, tidy_text, value
from prime_jax.data.records import Example, Passage
from prime_jax.errors import DataError, PredictorError

DEV_SHARE = 0.05


def main(argv: Sequence[str] | None = None) -> int:
    """Read both files, write the folder, say what is in it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("train", type=Path, help="hotpot_train_v1.1.json")
    parser.add_argument("dev", type=Path, help="hotpot_dev_distractor_v1.json; becomes test")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    given = parser.parse_args(argv)
    try:
        writer = RecipeWriter(given.out, identity_of([given.train, given.dev], recipe="hotpotqa"))
        write(writer, given.train, given.dev)
        writer.finish(
            "HotpotQA, https://hotpotqa.github.io, distractor setting (Yang et al. 2018)", "CC BY-SA 4.0"
        )
    except (PredictorError, OSError) as mistake:
        print(f"prepare_hotpotqa: {mistake}", file=sys.stderr)
        return 2
    print(writer.summary())
    return 0


def write(writer: RecipeWriter, train: Path, dev: Path) -> None:
    """All passages first, so that every right answer is known when its question is written."""
    for place, record in writer.each("passages", records_of_both(train, dev)):
        for _, passage in paragraphs(record, place):
            writer.passage(passage)
    for path, test in ((train, False), (dev, True)):
        for place, record in writer.each(f"questions of {path.name}", records_of(path)):
            example = example_of(record, place)
            if example is None:
                writer.leave_out("a supporting paragraph is not among the given ones")
            else:
                split = "dev" if share_of(example.id) < DEV_SHARE else "train"
                writer.example("test" if test else split, example, place)


def records_of_both(train: Path, dev: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The questions of both files, one after the other."""
    yield from records_of(train)
    yield from records_of(dev)


def paragraphs(record: dict[str, Any], place: str) -> Iterator[tuple[str, Passage]]:
    """Title and passage of each paragraph that is given with a question."""
    for entry in value(record, "context", list, place):
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], list)):
            raise DataError(f"{place}: 'context' must hold pairs of a title and a list of sentences")
        title, sentences = entry
        text = tidy_text(f"{title}: {''.join(map(str, sentences))}")
        yield str(title), Passage(text_id("h", text), text)


def example_of(record: dict[str, Any], place: str) -> Example | None:
    """A question and the paragraphs it is supported by; None where one of these is missing."""
    supporting = {str(fact[0]) for fact in value(record, "supporting_facts", list, place)}
    found = {title: passage.id for title, passage in paragraphs(record, place)}
    if not supporting <= found.keys():
        return None
    return Example(
        id=value(record, "_id", str, place),
        context=(),
        query=tidy_text(value(record, "question", str, place)),
        positives=tuple(dict.fromkeys(found[title] for title in found if title in supporting)),
        extra={name: record[name] for name in ("type", "level", "answer") if name in record},
    )


if __name__ == "__main__":
    sys.exit(main())

r"""Turn MS MARCO passage ranking (Nguyen et al. 2016) into training data: a question and its passage.

    python train/prepare_msmarco.py --collection collection.tsv --queries queries.train.tsv \
        --qrels qrels.train.tsv --dev-queries queries.dev.small.tsv --dev-qrels qrels.dev.small.tsv --out DIR
        [--share 0.1]

Files as published, `.gz` or not. Train questions become train and, one in a hundred, dev; the published
dev.small becomes test. `--share` keeps all right answers and that share of the other passages, for a machine
that cannot hold 8.8 million. Turns are empty: use `data.context_from: search`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from prime_jax.data.recipe import RecipeWriter, identity_of, share_of, tidy_text, tsv_rows
from prime_jax.data.records import Example, Passage
from prime_jax.errors import DataError, PredictorError

DEV_SHARE = 0.01


def main(argv: Sequence[str] | None = None) -> int:
    """Read the files, write the folder, say what is in it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--collection", type=Path, required=True, help="collection.tsv: id, passage")
    parser.add_argument("--queries", type=Path, required=True, help="queries.train.tsv: id, question")
    parser.add_argument("--qrels", type=Path, required=True, help="qrels.train.tsv: question, 0, passage, 1")
    parser.add_argument("--dev-queries", type=Path, required=True, help="queries.dev.small.tsv; becomes test")
    parser.add_argument("--dev-qrels", type=Path, required=True, help="qrels.dev.small.tsv")
    parser.add_argument(
        "--share", type=float, default=1.0, help="of passages that answer nothing (default: 1)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    given = parser.parse_args(argv)
    paths = [given.collection, given.queries, given.qrels, given.dev_queries, given.dev_qrels]
    try:
        writer = RecipeWriter(given.out, identity_of(paths, recipe="msmarco", share=given.share))
        right = {path: answers(path) for path in (given.qrels, given.dev_qrels)}
        wanted = {f"m{one}" for of_file in right.values() for ids in of_file.values() for one in ids}
        for _, (name, text) in writer.each("passages", tsv_rows(given.collection, 2)):
            if f"m{name}" in wanted or share_of(name) < given.share:
                writer.passage(Passage(f"m{name}", tidy_text(text)))
        for queries, qrels, test in (
            (given.queries, given.qrels, False),
            (given.dev_queries, given.dev_qrels, True),
        ):
            questions(writer, queries, right[qrels], test)
        writer.finish(
            "MS MARCO passage ranking, https://microsoft.github.io/msmarco (Nguyen et al. 2016)",
            "non-commercial research only (see the source)",
        )
    except (PredictorError, OSError) as mistake:
        print(f"prepare_msmarco: {mistake}", file=sys.stderr)
        return 2
    print(writer.summary())
    return 0


def answers(qrels: Path) -> dict[str, list[str]]:
    """Ids of the right passages of each question."""
    found: dict[str, list[str]] = {}
    for place, (question, _, passage, relevance) in tsv_rows(qrels, 4):
        if not relevance.isdecimal():
            raise DataError(f"{place}: the relevance {relevance!r} is no number")
        if int(relevance) > 0 and passage not in found.setdefault(question, []):
            found[question].append(passage)
    return found


def questions(writer: RecipeWriter, queries: Path, right: dict[str, list[str]], test: bool) -> None:
    """Write the questions of one file that have a right answer."""
    for place, (name, text) in writer.each(f"questions of {queries.name}", tsv_rows(queries, 2)):
        if not right.get(name):
            writer.leave_out("no passage is marked as right")
            continue
        positives = tuple(f"m{passage}" for passage in right[name])
        split = "dev" if share_of(name) < DEV_SHARE else "train"
        writer.example("test" if test else split, Example(f"q{name}", (), tidy_text(text), positives), place)


if __name__ == "__main__":
    sys.exit(main())

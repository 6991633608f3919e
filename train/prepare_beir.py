r"""Turn a folder in the form of BEIR (Thakur et al. 2021) into training data: a question and its passages.

    python train/prepare_beir.py scifact/ --out DIR

Reads `corpus.jsonl` {_id, title, text}, `queries.jsonl` {_id, text} and `qrels/train.tsv`, `dev.tsv` and
`test.tsv` (question, passage, score, below a line of names), as published or `.gz`. Where there are no dev
judgements one train question in ten becomes dev; where there are none for train either, which is so for most
sets of BEIR, `--seed` splits the test questions 60 / 10 / 30. Turns are empty: use `data.context_from:
search`.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from prime_jax.data.recipe import RecipeWriter, identity_of, records_of, share_of, tidy_text, tsv_rows, value
from prime_jax.data.records import Example, Passage
from prime_jax.errors import DataError, PredictorError

Judgements = dict[str, list[str]]  # right passages by question


def main(argv: Sequence[str] | None = None) -> int:
    """Read the folder, write the other one, say what is in it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds corpus.jsonl, queries.jsonl and qrels/")
    parser.add_argument("--seed", type=int, default=0, help="which questions go to which split")
    parser.add_argument("--licence", default="see the source of the set", help="of the data, for SOURCE.md")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    given = parser.parse_args(argv)
    try:
        corpus, queries = (found(given.folder, f"{name}.jsonl") for name in ("corpus", "queries"))
        judged = {
            name: path
            for name in ("train", "dev", "test")
            if (path := existing(given.folder / "qrels" / f"{name}.tsv")) is not None
        }
        if not judged:
            raise DataError(f"{given.folder / 'qrels'}: holds none of train.tsv, dev.tsv and test.tsv")
        paths = [corpus, queries, *judged.values()]
        writer = RecipeWriter(given.out, identity_of(paths, recipe="beir", seed=given.seed))
        for place, record in writer.each("passages", records_of(corpus)):
            title, text = (tidy_text(str(record.get(key) or "")) for key in ("title", "text"))
            name = value(record, "_id", str, place)
            writer.passage(Passage(passage_id(name), f"{title}: {text}" if title and text else title or text))
        splits = {name: judgements(path) for name, path in judged.items()}
        for place, record in writer.each("questions", records_of(queries)):
            name = value(record, "_id", str, place)
            query = tidy_text(value(record, "text", str, place))
            for split, right in split_of(name, splits, given.seed):
                positives = tuple(dict.fromkeys(passage_id(passage) for passage in right))
                writer.example(split, Example(passage_id(name), (), query, positives), place)
        writer.finish(f"{given.folder.name}, in the form of BEIR (Thakur et al. 2021)", given.licence)
    except (PredictorError, OSError) as mistake:
        print(f"prepare_beir: {mistake}", file=sys.stderr)
        return 2
    print(writer.summary())
    return 0


def existing(path: Path) -> Path | None:
    """A file, packed or not; None where there is neither."""
    packed = path.with_name(f"{path.name}.gz")
    return path if path.is_file() else packed if packed.is_file() else None


def found(folder: Path, name: str) -> Path:
    """A file that must be there.

    Raises:
        DataError: If it is not.
    """
    path = existing(folder / name)
    if path is None:
        raise DataError(f"{folder / name}: the file is missing")
    return path


def judgements(path: Path) -> Judgements:
    """The right passages of every question, from a qrels file."""
    right: Judgements = {}
    for number, (place, (question, passage, score)) in enumerate(tsv_rows(path, 3)):
        if number == 0 and not score.lstrip("-").isdecimal():
            continue  # the names of the columns
        if not score.lstrip("-").isdecimal():
            raise DataError(f"{place}: the score {score!r} is no number")
        if int(score) > 0:
            right.setdefault(question, []).append(passage)
    return right


def split_of(name: str, splits: Mapping[str, Judgements], seed: int) -> list[tuple[str, list[str]]]:
    """The splits a question belongs to, with its right passages there."""
    share = share_of(f"{seed} {name}")
    if "train" not in splits:  # one set of judgements must do for all
        right = next((by_question[name] for by_question in splits.values() if name in by_question), None)
        split = "train" if share < 0.6 else "dev" if share < 0.7 else "test"
        return [] if right is None else [(split, right)]
    chosen = []
    for split, by_question in splits.items():
        if name in by_question:
            moved = split == "train" and "dev" not in splits and share < 0.1
            chosen.append(("dev" if moved else split, by_question[name]))
    return chosen


def passage_id(name: str) -> str:
    """An id without white space, which TREC files cannot express."""
    return "_".join(name.split())


if __name__ == "__main__":
    sys.exit(main())

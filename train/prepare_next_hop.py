"""Make questions with several right passages into second hops: one of them is given, find the others.

    python train/prepare_next_hop.py DIR --out DIR

Reads a data folder of this library. Of every question with two right passages or more the one nearest to the
question, which a first search finds soonest, becomes the turn before it, and is excluded from its results;
the others are to be found. Questions with a single right passage are left out.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from prime_jax.data.encode import load_encoder
from prime_jax.data.prepare import prepare
from prime_jax.data.recipe import RecipeWriter, identity_of
from prime_jax.data.records import SPLITS, Example
from prime_jax.errors import DataError, PredictorError


def main(argv: Sequence[str] | None = None) -> int:
    """Read the folder, write the other one, say what is in it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="data folder with several right passages for a question")
    parser.add_argument("--encoder", default="minilm", help="what nearest means (default: minilm)")
    parser.add_argument("--licence", default="see the source of the set", help="of the data, for SOURCE.md")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    given = parser.parse_args(argv)
    try:
        splits = tuple(name for name in SPLITS if (given.folder / f"{name}.jsonl").is_file())
        if not splits:
            raise DataError(f"{given.folder}: holds no train.jsonl, dev.jsonl or test.jsonl")
        encoder = load_encoder(given.encoder)
        dataset, store = prepare(given.folder, splits, encoder)
        files = [given.folder / f"{name}.jsonl" for name in ("corpus", *splits)]
        writer = RecipeWriter(given.out, identity_of(files, recipe="next_hop", encoder=encoder.identity))
        for passage in writer.each("passages", dataset.corpus):
            writer.passage(passage)
        text_of = {passage.id: passage.text for passage in dataset.corpus}
        for split, examples in dataset.splits.items():
            for number, example in writer.each(split, enumerate(examples, 1)):
                if len(example.positives) < 2:
                    writer.leave_out("a single right passage")
                    continue
                query = store[store.rows([example.query])][0]
                facts = store[store.rows([text_of[name] for name in example.positives])]
                first = example.positives[int(np.argmax(facts @ query))]
                hop = second_hop(example, first, text_of[first])
                writer.example(split, hop, f"{given.folder / split}.jsonl, line {number}")
        writer.finish(f"second hops of {given.folder.name}, the nearest right passage given", given.licence)
    except (PredictorError, OSError) as mistake:
        print(f"prepare_next_hop: {mistake}", file=sys.stderr)
        return 2
    print(writer.summary())
    return 0


def second_hop(example: Example, first: str, text: str) -> Example:
    """The example with its right passage `first` as the newest turn, and the others to be found."""
    others = tuple(name for name in example.positives if name != first)
    return Example(
        example.id,
        (*example.context, text),
        example.query,
        others,
        negatives=example.negatives,
        exclude=tuple(dict.fromkeys((*example.exclude, first))),
        scope=example.scope,
        extra=example.extra,
    )


if __name__ == "__main__":
    sys.exit(main())

r"""Turn TopiOCQA (Adlakha et al. 2022) into training data: topics change, the next passage is wanted.

    python train/prepare_topiocqa.py topiocqa_train.jsonl topiocqa_valid.jsonl --out DIR \
        [--collection full_wiki_segments.tsv --share 0.01]

Both files as published, JSON lines or a JSON list. Context is what was asked and answered before. Every right
passage is in the corpus; with --collection (id, text, title; `.gz` or not) also that share of Wikipedia's
25.7 million. Questions without an answer are left out. One conversation of train in twenty becomes dev, as a
whole; the published validation conversations become test.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prime_jax.data.recipe import (
    RecipeWriter,
    identity_of,
    past_turns,
    records_of,
    share_of,
    tidy_text,
    tsv_rows,
    value,
)
from prime_jax.data.records import Example, Passage
from prime_jax.errors import PredictorError

DEV_SHARE = 0.05


def main(argv: Sequence[str] | None = None) -> int:
    """Read the files, write the folder, say what is in it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("train", type=Path, help="topiocqa_train.jsonl")
    parser.add_argument("valid", type=Path, help="topiocqa_valid.jsonl; becomes test")
    parser.add_argument("--collection", type=Path, help="full_wiki_segments.tsv: id, text, title")
    parser.add_argument("--share", type=float, default=1.0, help="of the collection (default: 1)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    given = parser.parse_args(argv)
    paths = [path for path in (given.train, given.valid, given.collection) if path is not None]
    try:
        writer = RecipeWriter(given.out, identity_of(paths, recipe="topiocqa", share=given.share))
        for path in (given.train, given.valid):
            for place, record in writer.each(f"passages of {path.name}", records_of(path)):
                if (passage := right_passage(record, place)) is not None:
                    writer.passage(passage)
        if given.collection is not None:
            for _, (name, text, title) in writer.each("collection", tsv_rows(given.collection, 3)):
                if name != "id" and share_of(name) < given.share:  # the first line names the columns
                    writer.passage(passage_of(name, title, text))
        for path in (given.train, given.valid):
            for place, record in writer.each(f"turns of {path.name}", records_of(path)):
                question(writer, record, place, path == given.valid)
        writer.finish(
            "TopiOCQA, https://mcgill-nlp.github.io/topiocqa (Adlakha et al. 2022)", "CC BY-NC-SA 4.0"
        )
    except (PredictorError, OSError) as mistake:
        print(f"prepare_topiocqa: {mistake}", file=sys.stderr)
        return 2
    print(writer.summary())
    return 0


def passage_of(name: str, title: str, text: str) -> Passage:
    """A section of Wikipedia; its title is "page [SEP] section"."""
    return Passage(f"w{name}", tidy_text(f"{title.replace(' [SEP] ', ', ')}: {text}"))


def right_passage(record: Mapping[str, Any], place: str) -> Passage | None:
    """The passage a turn is answered from; None where it has no answer."""
    gold = value(record, "Gold_passage", dict, place)
    if not gold.get("text"):
        return None
    name = str(gold.get("id", "")).removeprefix("wiki:")
    return passage_of(name, value(gold, "title", str, place), value(gold, "text", str, place))


def question(writer: RecipeWriter, record: Mapping[str, Any], place: str, test: bool) -> None:
    """Write one turn, if it has an answer."""
    passage = right_passage(record, place)
    if passage is None:
        writer.leave_out("has no answer")
        return
    conversation, turn = (value(record, key, int, place) for key in ("Conversation_no", "Turn_no"))
    split = "dev" if share_of(str(conversation)) < DEV_SHARE else "train"
    example = Example(
        id=f"{conversation}_{turn}",
        context=past_turns(record, place),
        query=tidy_text(value(record, "Question", str, place)),
        positives=(passage.id,),
        extra={"topic": record["Topic"]} if record.get("Topic") else {},
    )
    writer.example("test" if test else split, example, place)


if __name__ == "__main__":
    sys.exit(main())

"""Turn Natural Questions (Kwiatkowski et al. 2019) into training data: a question and its paragraph.

    python train/prepare_natural_questions.py --train simplified-nq-train.jsonl.gz --test nq-dev-*.jsonl.gz
    --out DIR

Takes the simplified form (`document_text`) and the original one (`document_tokens`), JSON lines, `.gz` or
not, in any number of files with --train and --test. The outermost candidates of every page are the passages,
without their HTML, the page's title in front. Questions that nobody found a paragraph for are left out. One
train question in twenty becomes dev. Turns are empty: use `data.context_from: search`.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

from prime_jax.data.recipe import RecipeWriter, identity_of, records_of, share_of, text_id, tidy_text, value
from prime_jax.data.records import Example, Passage
from prime_jax.errors import DataError, PredictorError

DEV_SHARE = 0.05
SHORTEST = 10  # words; shorter candidates are captions and cells
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")


def main(argv: Sequence[str] | None = None) -> int:
    """Read the files, write the folder, say what is in it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train", type=Path, nargs="+", required=True, help="train files")
    parser.add_argument("--test", type=Path, nargs="+", required=True, help="the published dev files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    given = parser.parse_args(argv)
    paths = [*given.train, *given.test]
    try:
        writer = RecipeWriter(given.out, identity_of(paths, recipe="natural_questions"))
        for path in paths:
            for place, record in writer.each(f"passages of {path.name}", records_of(path)):
                for passage in passages(record, place).values():
                    writer.passage(passage)
        for path in paths:
            for place, record in writer.each(f"questions of {path.name}", records_of(path)):
                question(writer, record, place, path in given.test)
        writer.finish(
            "Natural Questions, https://ai.google.com/research/NaturalQuestions (Kwiatkowski et al. 2019)",
            "CC BY-SA 3.0",
        )
    except (PredictorError, OSError) as mistake:
        print(f"prepare_natural_questions: {mistake}", file=sys.stderr)
        return 2
    print(writer.summary())
    return 0


def question(writer: RecipeWriter, record: dict[str, Any], place: str, test: bool) -> None:
    """Write the question of a record, if somebody found paragraphs that answer it."""
    found = passages(record, place)
    right: dict[str, None] = {}
    for annotation in value(record, "annotations", list, place):
        answer = value(annotation, "long_answer", dict, place)
        start, end = (value(answer, key, int, place) for key in ("start_token", "end_token"))
        right |= {
            passage.id: None
            for (first, last), passage in found.items()
            if start >= 0 and first <= start and end <= last
        }
    if not right:
        writer.leave_out("nobody found a paragraph")
        return
    name = str(record.get("example_id") or text_id("q", str(record.get("question_text"))))
    split = "dev" if share_of(name) < DEV_SHARE else "train"
    query = tidy_text(value(record, "question_text", str, place))
    writer.example("test" if test else split, Example(f"n{name}", (), query, tuple(right)), place)


def passages(record: dict[str, Any], place: str) -> dict[tuple[int, int], Passage]:
    """The page's outermost candidates by their first and last token."""
    tokens, title = list(_tokens(record, place)), _title(record)
    found = {}
    for candidate in value(record, "long_answer_candidates", list, place):
        if not value(candidate, "top_level", bool, place):
            continue
        start, end = (value(candidate, key, int, place) for key in ("start_token", "end_token"))
        if not 0 <= start <= end <= len(tokens):
            raise DataError(f"{place}: a candidate ends at token {end} of {len(tokens)}")
        words = [token for token in tokens[start:end] if not _TAG.fullmatch(token)]
        if len(words) >= SHORTEST:
            text = tidy_text(f"{title}: {' '.join(words)}" if title else " ".join(words))
            found[start, end] = Passage(text_id("n", text), text)
    return found


def _tokens(record: dict[str, Any], place: str) -> Iterator[str]:
    if "document_text" in record:
        yield from value(record, "document_text", str, place).split(" ")
        return
    for token in value(record, "document_tokens", list, place):
        yield value(token, "token", str, place)


def _title(record: dict[str, Any]) -> str:
    if record.get("document_title"):
        return str(record["document_title"])
    address = urlparse(str(record.get("document_url", "")))
    (name, *_) = parse_qs(address.query).get("title", [address.path.rpartition("/")[2]])
    return unquote(name).replace("_", " ")


if __name__ == "__main__":
    sys.exit(main())

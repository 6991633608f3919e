r"""Turn QReCC (Anantha et al. 2021) into training data: a conversation and the next answer's passages.

    python train/prepare_qrecc.py --train scai-qrecc21-training-turns.json --test scai-qrecc21-test-turns.json
    \
        --test-truth scai-qrecc21-ground-truth.json --passages collection-paragraph/ --out DIR [--share 0.01]

The turns of the SCAI-QReCC-21 task and its passages, JSON lines of {id, contents}, in one file or a folder of
them, `.gz` or not. Context is what was asked and answered before. Turns without a right passage are left out.
One conversation of train in twenty becomes dev, as a whole. `--share` keeps all right answers and that share
of the other 54 million passages. Rewritten questions stay with the examples as `rewrite`.
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
    text_id,
    tidy_text,
    value,
)
from prime_jax.data.records import Example, Passage
from prime_jax.errors import DataError, PredictorError

DEV_SHARE = 0.05
Turn = tuple[int, int]


def main(argv: Sequence[str] | None = None) -> int:
    """Read the files, write the folder, say what is in it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train", type=Path, required=True, help="turns with their right passages")
    parser.add_argument("--test", type=Path, required=True, help="turns of the test")
    parser.add_argument("--test-truth", type=Path, help="their right passages, where in a file of their own")
    parser.add_argument("--passages", type=Path, required=True, help="file or folder of {id, contents}")
    parser.add_argument(
        "--share", type=float, default=1.0, help="of passages that answer nothing (default: 1)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    given = parser.parse_args(argv)
    try:
        collection = files_of(given.passages)
        turns = [path for path in (given.train, given.test, given.test_truth) if path is not None]
        writer = RecipeWriter(
            given.out, identity_of([*turns, *collection], recipe="qrecc", share=given.share)
        )
        truth = {turn_of(record, place): record for path in turns for place, record in records_of(path)}
        wanted = {passage for record in truth.values() for passage in record.get("Truth_passages", ())}
        for path in collection:
            for place, record in writer.each(f"passages of {path.name}", records_of(path)):
                name = value(record, "id", str, place)
                if name in wanted or share_of(name) < given.share:
                    text = tidy_text(value(record, "contents", str, place))
                    writer.passage(Passage(text_id("r", name), text))
        for path, test in ((given.train, False), (given.test, True)):
            for place, record in writer.each(f"turns of {path.name}", records_of(path)):
                question(writer, record, truth, place, test)
        writer.finish(
            "QReCC as in SCAI-QReCC-21, https://github.com/apple/ml-qrecc (Anantha et al. 2021)",
            "CC BY-SA 3.0",
        )
    except (PredictorError, OSError) as mistake:
        print(f"prepare_qrecc: {mistake}", file=sys.stderr)
        return 2
    print(writer.summary())
    return 0


def files_of(path: Path) -> list[Path]:
    """The files of passages, in order."""
    found = sorted(path.rglob("*.jsonl*")) if path.is_dir() else [path]
    if not found:
        raise DataError(f"{path}: holds no .jsonl file")
    return found


def turn_of(record: Mapping[str, Any], place: str) -> Turn:
    """Conversation and turn."""
    return value(record, "Conversation_no", int, place), value(record, "Turn_no", int, place)


def question(
    writer: RecipeWriter,
    record: Mapping[str, Any],
    truth: Mapping[Turn, Mapping[str, Any]],
    place: str,
    test: bool,
) -> None:
    """Write one turn, if it has a right passage."""
    conversation, turn = turn_of(record, place)
    known = truth[conversation, turn]
    right = tuple(dict.fromkeys(text_id("r", str(name)) for name in known.get("Truth_passages", ())))
    if not right:
        writer.leave_out("no passage is marked as right")
        return
    split = "dev" if share_of(str(conversation)) < DEV_SHARE else "train"
    example = Example(
        id=f"{conversation}_{turn}",
        context=past_turns(record, place),
        query=tidy_text(value(record, "Question", str, place)),
        positives=right,
        extra={"rewrite": known["Truth_rewrite"]} if known.get("Truth_rewrite") else {},
    )
    writer.example("test" if test else split, example, place)


if __name__ == "__main__":
    sys.exit(main())

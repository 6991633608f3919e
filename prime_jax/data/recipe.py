"""What the recipes in train/ share: published files read as a stream, a data folder written as one.

A recipe that is stopped goes on where it was: every some thousand records the sizes of the unfinished files
are noted, and the next run cuts them to these sizes and skips what is in them. The files take their names
together, when the last line of them is checked.
"""

import gzip
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, TypeVar

from prime_jax import files
from prime_jax.data.jsonl import parse
from prime_jax.data.records import SPLITS, Example, Passage, as_line
from prime_jax.errors import DataError
from prime_jax.locks import exclusive
from prime_jax.progress import progress

STATE = ".recipe.json"
EVERY = 10_000
_MARK = b"\xef\xbb\xbf"  # that some editors put in front of UTF-8
Record = TypeVar("Record")
Rows = Iterator[tuple[str, dict[str, Any]]]


class RecipeWriter:
    """Writes a data folder of the JSONL contract, one passage and example at a time.

    Args:
        out: The folder. It may hold an unfinished run of the same recipe on the same input, nothing else.
        identity: What was asked for, such as the names and sizes of the input files; JSON values.

    Attributes:
        counts: How many passages and examples of each split were written.
        left_out: How many records were left out, by reason.

    Raises:
        DataError: If the folder holds other data.
        ConfigError: If another process is writing there.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]):
        self._out, self._identity = out, json.loads(json.dumps(identity))
        self._streams: dict[str, IO[str]] = {}
        self._ids: set[str] = set()
        self.counts: dict[str, int] = {}
        self.left_out: dict[str, int] = {}
        self._finished: list[str] = []
        self._stage, self._done = "", 0
        with ExitStack() as held:
            held.enter_context(exclusive(out, "a data folder"))
            for name in ("corpus", *SPLITS):
                if (out / f"{name}.jsonl").exists():
                    raise DataError(f"{out / name}.jsonl: is there already; remove it or write elsewhere")
            if (out / STATE).exists():
                self._go_on(files.read_json(out / STATE, DataError))
            else:
                for name in ("corpus", *SPLITS):  # of a run that was stopped before it noted anything
                    self._part(name).unlink(missing_ok=True)
            self._held = held.pop_all()  # until `finish`

    def each(self, stage: str, records: Iterable[Record]) -> Iterator[Record]:
        """The records of a stage that no earlier run has written; notes how far it is as it goes."""
        if stage in self._finished:
            return
        skip = self._done if stage == self._stage else 0
        self._stage = stage
        with progress(stage, None, "records") as advance:
            for number, record in enumerate(records, 1):
                if number > skip:
                    yield record  # what the caller makes of it is written when the next one is asked for
                    if number % EVERY == 0:
                        self._note(number)
                advance(1)
        self._finished.append(stage)
        self._note(0)

    def passage(self, passage: Passage) -> None:
        """Write a passage; one with an id that is there already is left out."""
        if passage.id not in self._ids:
            self._ids.add(passage.id)
            self._write("corpus", passage)

    def example(self, split: str, example: Example, place: str) -> None:
        """Write an example; all passages must have been written before.

        Raises:
            DataError: If it names a passage that is not in the corpus, or its query is empty; names `place`.
        """
        if not example.query.strip() or not example.positives:
            raise DataError(f"{place}: has no query, or no right answer")
        for name in (*example.positives, *example.exclude, *example.negatives):
            if name not in self._ids:
                raise DataError(f"{place}: the passage '{name}' is in none of the files given")
        self._write(split, example)

    def leave_out(self, reason: str) -> None:
        """Count a record that makes no example."""
        self.left_out[reason] = self.left_out.get(reason, 0) + 1

    def finish(self, source: str, licence: str) -> None:
        """Give the files their names and write SOURCE.md.

        Raises:
            DataError: If train or dev would be empty.
        """
        with self._held:  # free again, also where this is refused
            self._finish(source, licence)

    def _finish(self, source: str, licence: str) -> None:
        for name in ("corpus", "train", "dev"):
            if not self.counts.get(name):
                raise DataError(f"{self._out}: '{name}' would be empty; is the input complete?")
        for stream in self._streams.values():
            _settle(stream)
            stream.close()
        for name in self.counts:
            self._part(name).replace(self._out / f"{name}.jsonl")
        counts = "".join(f"- {name}: {count:,}\n" for name, count in self.counts.items())
        left = "".join(f"- left out, {reason}: {count:,}\n" for reason, count in self.left_out.items())
        given = "".join(f"- {name}: {value}\n" for name, value in self._identity.items())
        text = f"{source}\n\nLicence of the data: {licence}\n\nMade of\n\n{given}\nHolds\n\n{counts}{left}"
        files.write_text(self._out / "SOURCE.md", text)
        (self._out / STATE).unlink(missing_ok=True)

    def summary(self) -> str:
        """A line for every count."""
        return "\n".join(f"{name}: {count:,}" for name, count in {**self.counts, **self.left_out}.items())

    def _part(self, name: str) -> Path:
        return self._out / f".{name}.jsonl.part"

    def _write(self, name: str, row: Passage | Example) -> None:
        if name not in self._streams:
            self._streams[name] = self._part(name).open("a", encoding="utf-8", newline="\n")
        self._streams[name].write(as_line(row))
        self.counts[name] = self.counts.get(name, 0) + 1

    def _note(self, done: int) -> None:
        for stream in self._streams.values():
            _settle(stream)
        self._done = done
        state = {
            "identity": self._identity,
            "finished": self._finished,
            "stage": self._stage,
            "done": done,
            "counts": self.counts,
            "left_out": self.left_out,
            "sizes": {name: self._part(name).stat().st_size for name in self._streams},
        }
        files.write_json(self._out / STATE, state)

    def _go_on(self, state: Mapping[str, Any]) -> None:
        if state["identity"] != self._identity:
            raise DataError(
                f"{self._out}: holds an unfinished run on other input or with other options; remove it "
                "or write elsewhere"
            )
        self._finished, self._stage, self._done = state["finished"], state["stage"], state["done"]
        self.counts, self.left_out = state["counts"], state["left_out"]
        for name in ("corpus", *SPLITS):
            part, size = self._part(name), state["sizes"].get(name, 0)
            if not part.exists():
                continue
            with part.open("r+b") as stream:
                stream.truncate(size)
            if size:
                self._streams[name] = part.open("a", encoding="utf-8", newline="\n")
        if "corpus" in self._streams:
            with self._part("corpus").open(encoding="utf-8") as lines:
                self._ids = {json.loads(line)["id"] for line in lines}


def records_of(path: Path) -> Rows:
    """The objects of a JSON list or of JSON lines, `.gz` or not, one at a time, each with its place.

    Raises:
        DataError: If the file is missing, cut off, or not JSON; names file and place.
    """
    with _opened(path) as stream:
        if stream.peek(3)[:3] == _MARK:
            stream.read(3)
        start = stream.peek(64)[:64].lstrip()[:1]
        found = _list(path, stream) if start == b"[" else _lines(path, stream)
        for place, record in found:
            if not isinstance(record, dict):
                raise DataError(f"{place}: must be a JSON object")
            yield place, record


def tsv_rows(path: Path, columns: int) -> Iterator[tuple[str, list[str]]]:
    """The rows of a tab-separated file without quoting, `.gz` or not, each with its place.

    Raises:
        DataError: If the file is missing or a row has another number of columns.
    """
    with _opened(path) as stream:
        for number, line in enumerate(stream, 1):
            place = f"{path}, line {number}"
            cells = _text(line, place).rstrip("\r\n").split("\t")
            if len(cells) != columns:
                raise DataError(f"{place}: has {len(cells)} columns, expected {columns}")
            yield place, cells


def value(record: Mapping[str, Any], key: str, kind: type[Record], place: str) -> Record:
    """A field of a published record.

    Raises:
        DataError: If it is missing or of another kind.
    """
    if key not in record:
        raise DataError(f"{place}: the key '{key}' is missing (found: {', '.join(record) or 'none'})")
    found = record[key]
    if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
        raise DataError(f"{place}: '{key}' must be of type {kind.__name__}, not {type(found).__name__}")
    return found


def past_turns(record: Mapping[str, Any], place: str) -> tuple[str, ...]:
    """What was said before, oldest first, from the `Context` of a published conversation; blanks left out."""
    said = (tidy_text(str(turn)) for turn in value(record, "Context", list, place))
    return tuple(turn for turn in said if turn)


def share_of(key: str) -> float:
    """A number from 0 to 1 that is always the same for the same text: which split, which sample."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big") / 2**56


def identity_of(paths: Sequence[Path], **options: Any) -> dict[str, Any]:
    """Names and sizes of input files, and the options that change what is made of them.

    Raises:
        DataError: If a file is missing.
    """
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: there is no such file")
    return {**{path.name: f"{path.stat().st_size:,} bytes" for path in paths}, **options}


def tidy_text(text: str) -> str:
    """Blanks and line breaks of any number as one blank."""
    return " ".join(text.split())


def text_id(prefix: str, text: str) -> str:
    """An id made from the text itself, so that the same passage has it everywhere."""
    return prefix + hashlib.sha256(text.encode()).hexdigest()[:16]


def _settle(stream: IO[str]) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _opened(path: Path) -> Any:
    try:
        return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
    except OSError as problem:
        raise DataError(f"{path}: cannot be read ({problem.strerror})") from None


def _lines(path: Path, stream: Any) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_whole(path, stream), 1):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, parse(_text(line, place), place)


def _list(path: Path, stream: Any) -> Iterator[tuple[str, Any]]:
    try:
        import ijson
    except ImportError:
        raise DataError(
            f'{path}: reading a JSON list needs ijson; run: pip install "prime-jax[recipes]"'
        ) from None
    number = 0
    try:
        for number, record in enumerate(ijson.items(stream, "item", use_float=True), 1):
            yield f"{path}, record {number}", record
    except (ijson.JSONError, EOFError, gzip.BadGzipFile) as wrong:
        raise DataError(f"{path}, after record {number}: not valid JSON, or cut off ({wrong})") from None


def _whole(path: Path, stream: Any) -> Iterator[bytes]:
    try:
        yield from stream
    except (EOFError, gzip.BadGzipFile) as wrong:
        raise DataError(f"{path}: cut off or damaged ({wrong})") from None


def _text(line: bytes, place: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as wrong:
        raise DataError(f"{place}: not UTF-8 (byte {wrong.start + 1} of the line)") from None

"""The JSONL contract: a folder with corpus.jsonl and train, dev or test.jsonl, read and checked line by line.

docs/data.md describes the contract. Whatever breaks it is a DataError that names file, line and key.
"""

import difflib
import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from prime_jax import files
from prime_jax.data.jsonl import read_lines, text_list, text_value
from prime_jax.errors import DataError
from prime_jax.locks import exclusive

SPLITS = ("train", "dev", "test")

_NEAR = 0.82  # similarity from which an unknown key is taken for a misspelt one: "excluded" yes, "idx" no


@dataclass(frozen=True, slots=True)
class Passage:
    """One row of the corpus.

    Attributes:
        id: Unique in the corpus.
        text: What is searched.
        scope: Only examples of the same scope search this passage.
        extra: Keys of the line that are not in the contract.
    """

    id: str
    text: str
    scope: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Example:
    """One query and its right answers.

    Attributes:
        id: Unique in its split (see `load_dataset` for train).
        context: Turns before the query, oldest first; may be empty.
        query: The current turn.
        positives: Corpus ids of the right answers, at least one.
        negatives: Corpus ids known to be wrong.
        exclude: Corpus ids never returned or counted for this query, such as turns already seen.
        scope: Only passages of the same scope are searched; None searches those that have none.
        extra: Keys of the line that are not in the contract.
    """

    id: str
    context: tuple[str, ...]
    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    scope: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """A corpus and the examples that search it, by split."""

    corpus: tuple[Passage, ...]
    splits: dict[str, tuple[Example, ...]]

    @cached_property
    def hash(self) -> str:
        """SHA-256 over everything in the dataset: it names the exact data a checkpoint was trained on."""
        digest = hashlib.sha256()
        for name, rows in [("corpus", self.corpus), *sorted(self.splits.items())]:
            digest.update(f"{name} {len(rows)}\n".encode())
            digest.update("".join(map(as_line, rows)).encode())
        return digest.hexdigest()


def load_dataset(folder: Path, splits: Sequence[str] | None = None) -> Dataset:
    """Read a data folder.

    In train an id may come again with another query or other answers (one question with several proofs); that
    is reported as a warning. Everywhere else, and for the same line twice, a repeated id is an error. Turns
    without text, as logs have them, are left out with a warning.

    Args:
        folder: Holds `corpus.jsonl` and one `<split>.jsonl` per split.
        splits: Which splits to read; None reads those of train, dev and test that exist.

    Raises:
        DataError: If a file is missing or empty, or a line breaks the contract; names file, line and key.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    if splits is None:
        splits = [name for name in SPLITS if (folder / f"{name}.jsonl").exists()]
        if not splits:
            raise DataError(f"{folder}: holds none of train.jsonl, dev.jsonl and test.jsonl")
    for name in splits:
        if name == "corpus" or not re.fullmatch(r"[\w-]+", name):
            raise DataError(f"{name!r} cannot be the name of a split")
    corpus = _read_corpus(folder / "corpus.jsonl")
    return Dataset(
        corpus=tuple(corpus.values()),
        splits={name: tuple(_read_split(folder / f"{name}.jsonl", name, corpus)) for name in splits},
    )


def write_dataset(folder: Path, dataset: Dataset) -> None:
    """Write a data folder; its files take their names together, after all of them are complete.

    Raises:
        DataError: If the folder holds a split that the dataset does not have: it would no longer fit.
        ConfigError: If another process is writing there.
    """
    with ExitStack() as stack:
        stack.enter_context(exclusive(folder, "a data folder"))
        for name in SPLITS:
            if name not in dataset.splits and (folder / f"{name}.jsonl").exists():
                raise DataError(f"{folder / name}.jsonl: belongs to other data; remove it or write elsewhere")
        for name, rows in [("corpus", dataset.corpus), *dataset.splits.items()]:
            temporary = stack.enter_context(files.atomic_path(folder / f"{name}.jsonl"))
            with temporary.open("w", encoding="utf-8", newline="\n") as stream:
                stream.writelines(map(as_line, rows))


def _ids(row: Mapping[str, Any], key: str, place: str, corpus: Mapping[str, Passage]) -> tuple[str, ...]:
    ids = text_list(row, key, place)
    for at, name in enumerate(ids):
        if name not in corpus:
            raise DataError(f"{place}: '{key}' names '{name}', which is not in the corpus")
        if name in ids[:at]:
            raise DataError(f"{place}: '{key}' names '{name}' twice")
    return ids


def _read_corpus(path: Path) -> dict[str, Passage]:
    corpus: dict[str, Passage] = {}
    for place, row in read_lines(path):
        extra = _extra(row, ("id", "text", "scope"), place)
        name, text = text_value(row, "id", place), text_value(row, "text", place)
        passage = Passage(name, text, _scope(row, place), extra)
        if passage.id in corpus:
            raise DataError(f"{place}: the id '{passage.id}' is there twice")
        corpus[passage.id] = passage
    return corpus


def _read_split(path: Path, split: str, corpus: Mapping[str, Passage]) -> Iterator[Example]:
    seen: dict[str, list[tuple[str, Example]]] = {}
    repeated: list[str] = []
    silent: list[str] = []
    for place, row in read_lines(path):
        example = _example(row, place, corpus)
        silent += [place] * (len(row["context"]) - len(example.context))
        for earlier, other in seen.get(example.id, ()):
            if split != "train" or other == example:
                raise DataError(f"{place}: the id '{example.id}' is there twice (see {earlier})")
        if example.id in seen:
            repeated.append(place)
        seen.setdefault(example.id, []).append((place, example))
        yield example
    if repeated:
        warnings.warn(
            f"{path}: {len(repeated)} examples repeat the id of another one, the first at {repeated[0]}",
            stacklevel=3,
        )
    if silent:
        warnings.warn(
            f"{path}: {len(silent)} turns have no text and are left out, the first at {silent[0]}",
            stacklevel=3,
        )


def _example(row: Mapping[str, Any], place: str, corpus: Mapping[str, Passage]) -> Example:
    extra = _extra(row, ("id", "context", "query", "positives", "negatives", "exclude", "scope"), place)
    example = Example(
        id=text_value(row, "id", place),
        context=text_list(row, "context", place, skip_empty=True),
        query=text_value(row, "query", place),
        positives=_ids(row, "positives", place, corpus),
        negatives=_ids(row, "negatives", place, corpus) if "negatives" in row else (),
        exclude=_ids(row, "exclude", place, corpus) if "exclude" in row else (),
        scope=_scope(row, place),
        extra=extra,
    )
    if not example.positives:
        raise DataError(f"{place}: 'positives' is empty")
    for positive in example.positives:
        for key, others in (("negatives", example.negatives), ("exclude", example.exclude)):
            if positive in others:
                raise DataError(f"{place}: '{positive}' is in 'positives' and in '{key}'")
        if corpus[positive].scope != example.scope:
            raise DataError(
                f"{place}: the scope is {example.scope!r}, that of its positive '{positive}' is "
                f"{corpus[positive].scope!r}"
            )
    return example


def _scope(row: Mapping[str, Any], place: str) -> str | None:
    return None if row.get("scope") is None else text_value(row, "scope", place)


def _extra(row: Mapping[str, Any], contract: Sequence[str], place: str) -> dict[str, Any]:
    """The keys outside the contract, after refusing those that look like a misspelt one of it."""
    extra = {key: value for key, value in row.items() if key not in contract}
    for key in extra:
        near = difflib.get_close_matches(key.lower(), contract, n=1, cutoff=_NEAR)
        if near:
            raise DataError(f"{place}: unknown key '{key}'; did you mean '{near[0]}'?")
    return extra


def as_line(row: Any) -> str:
    """A passage or example as one line of JSON; optional keys only where they say something."""
    values: dict[str, Any] = {"id": row.id}
    if isinstance(row, Passage):
        values["text"] = row.text
    else:
        values |= {"context": row.context, "query": row.query, "positives": row.positives}
        values |= {key: ids for key in ("negatives", "exclude") if (ids := getattr(row, key))}
    if row.scope is not None:
        values["scope"] = row.scope
    return json.dumps(values | row.extra, ensure_ascii=False, allow_nan=False) + "\n"

"""Reading JSON lines that a person wrote: every mistake is a DataError that names the file and the line.

Blank lines, a byte-order mark and CRLF are tolerated. Text must be UTF-8 without NUL.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prime_jax.errors import DataError


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines file, each with its place ("file, line 3") for error messages.

    Raises:
        DataError: If the file cannot be read or holds no line, or a line is not a JSON object in UTF-8.
    """
    empty = True
    try:
        with path.open("rb") as stream:
            for number, raw in enumerate(stream, 1):
                line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                if line.strip():
                    empty = False
                    place = f"{path}, line {number}"
                    yield place, _object(line, place)
    except FileNotFoundError:
        raise DataError(f"{path}: the file is missing") from None
    except OSError as problem:
        raise DataError(f"{path}: cannot be read ({problem.strerror})") from None
    if empty:
        raise DataError(f"{path}: the file is empty")


def text_value(row: Mapping[str, Any], key: str, place: str) -> str:
    """The text under `key`, which must be there and not blank."""
    return _text(_value(row, key, place), f"{place}: '{key}'")


def text_list(row: Mapping[str, Any], key: str, place: str, *, skip_empty: bool = False) -> tuple[str, ...]:
    """The list of texts under `key`; it may be empty. Empty texts are refused, or left out."""
    values = _value(row, key, place)
    if not isinstance(values, list):
        raise DataError(f"{place}: '{key}' must be a list of strings, not {_kind(values)}")
    return tuple(
        _text(text, f"{place}: '{key}'[{at}]")
        for at, text in enumerate(values)
        if not (skip_empty and isinstance(text, str) and not text.strip())
    )


def parse(text: str, place: str) -> Any:
    """Strict JSON: no NaN or Infinity, no key twice."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as wrong:
        raise DataError(f"{place}: not valid JSON ({wrong})") from None


def _object(line: bytes, place: str) -> dict[str, Any]:
    try:
        text = line.decode()
    except UnicodeDecodeError as wrong:
        raise DataError(f"{place}: not UTF-8 (byte {wrong.start + 1} of the line)") from None
    if "\0" in text:
        raise DataError(f"{place}: holds a NUL character")
    value = parse(text, place)
    if not isinstance(value, dict):
        raise DataError(f"{place}: must be a JSON object, not {_kind(value)}")
    return value


def _value(row: Mapping[str, Any], key: str, place: str) -> Any:
    if key not in row:
        raise DataError(f"{place}: the key '{key}' is missing (found: {', '.join(row) or 'none'})")
    return row[key]


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} must be a string, not {_kind(value)}")
    if not value.strip():
        raise DataError(f"{what} is empty")
    if "\0" in value or (not value.isascii() and re.search("[\ud800-\udfff]", value)):
        raise DataError(f"{what} holds a NUL character or half of a surrogate pair")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in pairs:
        if key in row:
            raise ValueError(f"the key '{key}' is there twice")
        row[key] = value
    return row


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")

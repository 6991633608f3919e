"""Writing files so that a reader never sees half of one, and hashing them.

Every write goes to a temporary name in the same folder, is flushed to disk, and then takes its final name
in one step, so a killed process or a full disk leaves the previous file as it was.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prime_jax.errors import CheckpointError, PredictorError
from prime_jax.locks import exclusive


def user_path(text: str) -> Path:
    """A path as a user writes it; `~` is their home also where no shell expands it (`--out=~/x`, YAML).

    Raises:
        ValueError: If there is no such home.
    """
    try:
        return Path(text).expanduser() if text.startswith("~") else Path(text)  # ./~ is a folder here
    except RuntimeError as unknown:
        raise ValueError(f"{text}: {unknown}") from None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success flush it and rename it, on failure remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    temporary.chmod(0o644)
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 `text` to `path` atomically."""
    write_bytes(path, text.encode())


def json_text(value: Any) -> str:
    """`value` as indented JSON with a final newline; NaN and Inf are refused."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write `value` as `json_text`, atomically."""
    write_text(path, json_text(value))


def read_json(path: Path, error: type[PredictorError] = CheckpointError) -> Any:
    """Read a JSON file.

    Raises:
        error: If the file is missing or is not JSON; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: the file is missing") from None
    except (ValueError, RecursionError) as broken:
        raise error(f"{path}: not valid JSON ({str(broken).splitlines()[0]})") from None


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give an empty temporary folder; on success it takes the name `path` (replacing an older one).

    Raises:
        ConfigError: If another process is making the same folder.
    """
    with exclusive(path, f"a new {path.name}", lock=path.with_name(f".{path.name}.lock")) as holding:
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        temporary.chmod(0o755)
        try:
            yield temporary
            for file in temporary.rglob("*"):
                _flush(file)
            holding.check()
            old = path.with_name(f".{path.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                path.replace(old)
            temporary.replace(path)
            _flush(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

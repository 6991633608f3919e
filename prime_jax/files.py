"""Writing files so that a reader never sees half of one, and hashing them.

Every write goes to a temporary name in the same folder, is flushed to disk, and then takes its final name
in one step, so a killed process or a full disk leaves the previous file as it was.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prime_jax.errors import CheckpointError, PredictorError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


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


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, atomically; NaN and Inf are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, error: type[PredictorError] = CheckpointError) -> Any:
    """Read a JSON file.

    Raises:
        error: If the file is missing or is not JSON; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: the file is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as broken:
        raise error(f"{path}: not valid JSON ({broken})") from None


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give an empty temporary folder; on success it takes the name `path` (replacing an older one)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _flush(file)
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


def _files_under(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file()
        and file.relative_to(folder) != Path(MANIFEST)
        and file.parent.name != "__pycache__"  # Python's own, beside a module that was imported from here
    )


def write_manifest(folder: Path, kind: str, **facts: Any) -> None:
    """Record size and SHA-256 of every file in `folder` in its manifest.json, and its own (SEC-PRED-001)."""
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in _files_under(folder)
    }
    manifest = {"kind": kind, "format_version": FORMAT_VERSION, **facts, "files": files}
    write_json(folder / MANIFEST, {**manifest, "sha256": manifest_digest(manifest)})


def manifest_digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of what a manifest says, whatever its layout."""
    rest = {name: fact for name, fact in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def verify_manifest(
    folder: Path, kind: str, needed: Callable[[str], bool] = lambda name: True
) -> dict[str, Any]:
    """Check every file of `folder` that `needed` selects against manifest.json and return the manifest.

    Raises:
        CheckpointError: If the manifest is missing or of another kind or version, a listed file is missing,
            a file is not listed, or any byte differs. The message names the file.
    """
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{folder / MANIFEST}: not a manifest of this library")
    if manifest.get("kind") != kind:
        raise CheckpointError(f"{folder / MANIFEST}: describes a {manifest.get('kind')!r}, not a {kind!r}")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / MANIFEST}: format version {manifest.get('format_version')!r}, "
            f"this library reads version {FORMAT_VERSION}"
        )
    if manifest.get("sha256") != manifest_digest(manifest):
        raise CheckpointError(f"{folder / MANIFEST}: damaged or changed, it differs from its own SHA-256")
    listed: dict[str, Any] = manifest["files"]
    for name in listed:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{folder / MANIFEST}: the path {name!r} leaves the folder")
    for file in _files_under(folder):
        if file.relative_to(folder).as_posix() not in listed:
            raise CheckpointError(
                f"{file}: not listed in {MANIFEST}; the folder was changed after it was written"
            )
    for name, facts in listed.items():
        if not needed(name):
            continue
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: listed in {MANIFEST} but missing")
        if file.stat().st_size != facts["bytes"]:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes, {MANIFEST} says {facts['bytes']}")
        if sha256(file) != facts["sha256"]:
            raise CheckpointError(f"{file}: damaged or changed, its SHA-256 differs from {MANIFEST}")
    return manifest

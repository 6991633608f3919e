"""manifest.json: which files a checkpoint or a bundle has, their sizes and SHA-256, and what they are.

A folder is trusted only as a whole: every listed file must be there unchanged, none may be added, and the
manifest vouches for itself (SEC-PRED-001). Whoever changes a file on purpose can write a new manifest as
well; against that a folder is signed (`prime_jax.export.signing`).
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from prime_jax.errors import CheckpointError, PredictorError
from prime_jax.files import json_text, read_json, sha256, write_json

MANIFEST = "manifest.json"
SIGNATURE = "model.sig"  # vouches for the manifest too, so the manifest cannot list it
COMPILED = "code that Python compiled; delete it, and import from a bundle with python -B"
FORMAT_VERSION = 2
FIRST_VERSION = "1.0.0"
_SEMANTIC = re.compile(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?")


def write_manifest(folder: Path, kind: str, *, model_version: str = FIRST_VERSION, **facts: Any) -> None:
    """Record size and SHA-256 of every file in `folder` in its manifest.json, and its own.

    Args:
        folder: The folder, complete but for the manifest.
        kind: What it holds: `checkpoint` or `bundle`.
        model_version: Version of the model (semver.org), for people who replace one by the next.
        facts: What else is known; JSON values.

    Raises:
        PredictorError: If `model_version` is not a semantic version.
        CheckpointError: If there is a link in the folder.
    """
    check_version(model_version)
    listed = [folder / name for name in _names_in(folder)]
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": digest}
        for file, digest in zip(listed, _digests(listed), strict=True)
    }
    manifest = {
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "model_version": model_version,
        **facts,
        "files": files,
    }
    write_json(folder / MANIFEST, {**manifest, "sha256": manifest_digest(manifest)})


def check_version(version: str) -> None:
    """Refuse what is not a semantic version such as 1.2.0 or 2.0.0-rc.1.

    Raises:
        PredictorError: If it is none.
    """
    if not _SEMANTIC.fullmatch(version):
        raise PredictorError(f"model version {version!r} is not a semantic version such as 1.2.0")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a folder says of itself, in today's format, whatever the format it was written in.

    Only the manifest itself is checked; `verify_manifest` checks the files as well.

    Raises:
        CheckpointError: If it is missing, damaged, changed, of an unknown format, or names a path outside.
    """
    path = folder / MANIFEST
    manifest: dict[str, Any] = read_json(path)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{path}: not a manifest of this library")
    version = manifest.get("format_version")
    if type(version) is not int or (version != FORMAT_VERSION and version not in _UPGRADES):
        raise CheckpointError(
            f"{path}: format version {version!r}, this library reads versions 1 to {FORMAT_VERSION}"
        )
    if not _as_written(path, manifest) or manifest.get("sha256") != manifest_digest(manifest):
        raise CheckpointError(f"{path}: damaged or changed, it differs from its own SHA-256")
    for name, facts in manifest["files"].items():
        _check_entry(path, name, facts)
    while manifest["format_version"] != FORMAT_VERSION:
        manifest = _UPGRADES[manifest["format_version"]](manifest)
    _check_facts(path, manifest)
    return manifest


def verify_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """Check every file of `folder` against manifest.json and return the manifest, as `read_manifest` does.

    Raises:
        CheckpointError: As `read_manifest`; if it is of another kind, a listed file is missing, a file is
            not listed or a link, or any byte differs. The message names the file.
    """
    manifest = read_manifest(folder)
    if manifest.get("kind") != kind:
        raise CheckpointError(f"{folder / MANIFEST}: describes a {manifest.get('kind')!r}, not a {kind!r}")
    listed: dict[str, dict[str, Any]] = manifest["files"]
    for name in _names_in(folder):
        if name not in listed:
            why = COMPILED if ".pyc" in name else "the folder was changed after it was written"
            raise CheckpointError(f"{folder / name}: not listed in {MANIFEST}; {why}")
    for name, facts in listed.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: listed in {MANIFEST} but missing")
        if file.stat().st_size != facts["bytes"]:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes, {MANIFEST} says {facts['bytes']}")
    digests = _digests(folder / name for name in listed)
    for (name, facts), digest in zip(listed.items(), digests, strict=True):
        if digest != facts["sha256"]:
            raise CheckpointError(f"{folder / name}: damaged or changed, its SHA-256 differs from {MANIFEST}")
    return manifest


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of what a manifest says, whatever its layout."""
    rest = {name: fact for name, fact in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _names_in(folder: Path) -> list[str]:
    """Every file that belongs to the folder's content, by its path in it; links are refused."""
    paths = list(folder.rglob("*"))
    for path in paths:
        if path.is_symlink():  # what a folder's link leads to is not among them
            raise CheckpointError(f"{path}: a link; a {MANIFEST} vouches for what is in its folder alone")
    names = [path.relative_to(folder).as_posix() for path in paths if path.is_file()]
    return sorted(name for name in names if name not in (MANIFEST, SIGNATURE))


def _digests(files: Iterable[Path]) -> list[str]:
    """SHA-256 of each file; several at once, as hashing a gigabyte takes a second and leaves Python free."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(sha256, files))


def _check_entry(path: Path, name: str, facts: Any) -> None:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name or ":" in name:
        raise CheckpointError(f"{path}: the path {name!r} leaves the folder")
    known = isinstance(facts, dict) and isinstance(facts.get("bytes"), int)
    if not known or not isinstance(facts.get("sha256"), str):
        raise CheckpointError(f"{path}: does not say size and SHA-256 of {name!r}")


def _as_written(path: Path, manifest: dict[str, Any]) -> bool:
    try:
        return path.read_bytes() == json_text(manifest).encode()
    except ValueError:  # a number that only damage makes, such as 1e905
        return False


def _check_facts(path: Path, manifest: Mapping[str, Any]) -> None:
    """What every reader relies on; a manifest without it was not written by this library."""
    for name in ("kind", "model_version"):
        if not isinstance(manifest.get(name), str):
            raise CheckpointError(f"{path}: does not say its {name}")
    onnx = manifest.get("onnx", {})
    if not isinstance(onnx, dict) or any(file not in manifest["files"] for file in onnx.values()):
        raise CheckpointError(f"{path}: 'onnx' names a file that it does not list")
    if manifest["kind"] == "checkpoint":
        metrics = manifest.get("metrics")
        fit = isinstance(metrics, dict) and all(isinstance(value, int | float) for value in metrics.values())
        if not fit or not isinstance(manifest.get("step"), int):
            raise CheckpointError(f"{path}: does not say step and metrics of a checkpoint")


def _from_1(manifest: dict[str, Any]) -> dict[str, Any]:
    """Format 1 gave models no version, and bundles had one ONNX file."""
    upgraded = {**manifest, "format_version": 2, "model_version": FIRST_VERSION}
    holds_onnx = manifest.get("kind") == "bundle" and "model.onnx" in manifest["files"]
    return upgraded | ({"onnx": {"fp32": "model.onnx"}} if holds_onnx else {})


_UPGRADES: dict[Any, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1}

"""Atomic writes and manifests: nothing half-written, no change unnoticed."""

import json
from pathlib import Path
from typing import Any

import pytest

from prime_jax.errors import CheckpointError, DataError
from prime_jax.files import (
    atomic_folder,
    atomic_path,
    manifest_digest,
    read_json,
    verify_manifest,
    write_json,
    write_manifest,
)


def fill_the_disk(path: Path, *, folder: bool = False) -> None:
    with (atomic_folder if folder else atomic_path)(path) as temporary:
        (temporary / "a" if folder else temporary).write_text("half")
        raise OSError("disk full")


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"old": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(file, {"new": float("nan")})
    with pytest.raises(OSError, match="disk full"):
        fill_the_disk(file)
    assert json.loads(file.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(OSError, match="disk full"):
        fill_the_disk(target, folder=True)
    assert (target / "a").read_text() == "1"
    with atomic_folder(target) as folder:
        (folder / "b").write_text("3")
    assert [file.name for file in target.iterdir()] == ["b"]
    assert [file.name for file in tmp_path.iterdir()] == ["bundle"]


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "weights").write_bytes(bytes(range(256)))
    (tmp_path / "config").write_text("x")
    write_manifest(tmp_path, "thing", step=3)
    return tmp_path


def test_an_untouched_folder_verifies(sealed: Path) -> None:
    manifest = verify_manifest(sealed, "thing")
    assert manifest["step"] == 3
    assert manifest["files"]["deep/weights"]["bytes"] == 256


@pytest.mark.parametrize("offset", [0, 100, 255])
def test_any_flipped_bit_is_caught(sealed: Path, offset: int) -> None:
    file = sealed / "deep" / "weights"
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"deep/weights: damaged"):
        verify_manifest(sealed, "thing")


@pytest.mark.parametrize("bit", [0x01, 0x10, 0x80])
def test_any_flipped_bit_of_the_manifest_is_caught(sealed: Path, bit: int) -> None:
    """In a file's hash, a fact, a key or the layout."""
    file = sealed / "manifest.json"
    whole = file.read_bytes()
    for offset in range(len(whole)):
        data = bytearray(whole)
        data[offset] ^= bit
        file.write_bytes(data)
        if json.loads(whole) != _json_or_none(data):  # one blank for another changes nothing
            with pytest.raises(CheckpointError, match=r"manifest\.json"):
                verify_manifest(sealed, "thing")


def _json_or_none(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_truncated_missing_and_added_files_are_caught(sealed: Path) -> None:
    file = sealed / "deep" / "weights"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="255 bytes"):
        verify_manifest(sealed, "thing")
    file.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        verify_manifest(sealed, "thing")
    (sealed / "stranger").write_text("?")
    with pytest.raises(CheckpointError, match="stranger: not listed"):
        verify_manifest(sealed, "thing")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_a_manifest_cannot_reach_outside(sealed: Path, name: str) -> None:
    manifest = read_json(sealed / "manifest.json")
    manifest["files"][name] = {"bytes": 1, "sha256": "0"}
    write_json(sealed / "manifest.json", manifest | {"sha256": manifest_digest(manifest)})
    with pytest.raises(CheckpointError, match="leaves the folder"):
        verify_manifest(sealed, "thing")


def test_other_kinds_versions_and_non_manifests_are_refused(sealed: Path) -> None:
    with pytest.raises(CheckpointError, match="describes a 'thing', not a 'bundle'"):
        verify_manifest(sealed, "bundle")
    write_json(sealed / "manifest.json", {"kind": "thing", "format_version": 99, "files": {}})
    with pytest.raises(CheckpointError, match="version 99"):
        verify_manifest(sealed, "thing")
    write_json(sealed / "manifest.json", [])
    with pytest.raises(CheckpointError, match="not a manifest"):
        verify_manifest(sealed, "thing")


def test_unreadable_json_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(DataError, match=r"x\.json: not valid JSON"):
        read_json(tmp_path / "x.json", DataError)
    with pytest.raises(CheckpointError, match=r"y\.json: the file is missing"):
        read_json(tmp_path / "y.json")

"""manifest.json: no change to a folder goes unnoticed; what older versions wrote is still read."""

from pathlib import Path

import pytest

from prime_jax.errors import CheckpointError, PredictorError
from prime_jax.files import read_json, write_json
from prime_jax.manifest import (
    SIGNATURE,
    check_version,
    manifest_digest,
    read_manifest,
    verify_manifest,
    write_manifest,
)


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "weights").write_bytes(bytes(range(256)))
    (tmp_path / "config").write_text("x")
    write_manifest(tmp_path, "thing", step=3, metrics={"loss": 1e-05}, name="ü")
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


@pytest.mark.parametrize("bit", [0x01, 0x02, 0x04, 0x08, 0x10, 0x1C, 0x20, 0x40, 0x80])
def test_any_flipped_bit_of_the_manifest_is_caught(sealed: Path, bit: int) -> None:
    """In a file's hash, a fact, a key or the layout."""
    file = sealed / "manifest.json"
    whole = file.read_bytes()
    for offset in range(len(whole)):
        data = bytearray(whole)
        data[offset] ^= bit
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            verify_manifest(sealed, "thing")


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


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../b", "..\\\\b", "C:/b"])
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": []}, r"format version \[\]"),
        ({"format_version": True}, "format version True"),
        ({"kind": None}, "does not say its kind"),
        ({"model_version": 1}, "does not say its model_version"),
        ({"onnx": {"fp32": "../x"}}, "'onnx' names a file that it does not list"),
        ({"onnx": ["config"]}, "'onnx' names a file that it does not list"),
        ({"kind": "checkpoint", "metrics": {"loss": "low"}}, "does not say step and metrics"),
        ({"kind": "checkpoint", "step": "3"}, "does not say step and metrics"),
    ],
)
def test_what_readers_rely_on_must_be_there(sealed: Path, change: dict[str, object], message: str) -> None:
    manifest = read_json(sealed / "manifest.json") | change
    write_json(sealed / "manifest.json", manifest | {"sha256": manifest_digest(manifest)})
    with pytest.raises(CheckpointError, match=message):
        read_manifest(sealed)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": 1e999}', '{"a": ' + "9" * 5000 + "}", '"\\ud800"'])
def test_json_that_only_malice_writes_is_refused(sealed: Path, text: str) -> None:
    (sealed / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read_manifest(sealed)


def test_compiled_code_and_links_are_refused(sealed: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "config"
    (sealed / "config").rename(elsewhere)
    (sealed / "config").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="config: a link"):
        verify_manifest(sealed, "thing")
    (sealed / "config").unlink()
    elsewhere.rename(sealed / "config")
    verify_manifest(sealed, "thing")
    (sealed / "__pycache__").mkdir()
    (sealed / "__pycache__" / "x.pyc").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"x\.pyc: not listed"):
        verify_manifest(sealed, "thing")


@pytest.mark.parametrize("facts", [{}, {"bytes": "1", "sha256": "0"}, {"bytes": 1}, 7])
def test_an_entry_without_size_or_hash_is_refused(sealed: Path, facts: object) -> None:
    manifest = read_json(sealed / "manifest.json")
    manifest["files"]["config"] = facts
    write_json(sealed / "manifest.json", manifest | {"sha256": manifest_digest(manifest)})
    with pytest.raises(CheckpointError, match="does not say size and SHA-256 of 'config'"):
        read_manifest(sealed)


def test_a_signature_beside_the_files_is_not_a_stranger(sealed: Path) -> None:
    (sealed / SIGNATURE).write_text("{}")
    assert SIGNATURE not in verify_manifest(sealed, "thing")["files"]


def test_format_1_reads_as_format_2(sealed: Path) -> None:
    """Models had no version then, and a bundle one ONNX file."""
    now = read_json(sealed / "manifest.json")
    old = {name: fact for name, fact in now.items() if name != "model_version"} | {"format_version": 1}
    write_json(sealed / "manifest.json", old | {"sha256": manifest_digest(old)})
    read = verify_manifest(sealed, "thing")
    assert (read["format_version"], read["model_version"]) == (2, "1.0.0")
    old["kind"] = "bundle"
    (sealed / "config").rename(sealed / "model.onnx")
    old["files"]["model.onnx"] = old["files"].pop("config")
    write_json(sealed / "manifest.json", old | {"sha256": manifest_digest(old)})
    assert verify_manifest(sealed, "bundle")["onnx"] == {"fp32": "model.onnx"}


@pytest.mark.parametrize("version", ["1.2.0", "0.0.1", "2.0.0-rc.1", "1.0.0+build.5"])
def test_semantic_versions(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["1", "1.2", "v1.2.0", "01.2.3", "1.2.3 ", ""])
def test_other_versions_are_refused(sealed: Path, version: str) -> None:
    with pytest.raises(PredictorError, match="not a semantic version"):
        write_manifest(sealed, "thing", model_version=version)

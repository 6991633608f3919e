"""Atomic writes: nothing half-written."""

import json
from argparse import ArgumentParser
from pathlib import Path

import pytest

from prime_jax.errors import CheckpointError, ConfigError, DataError
from prime_jax.files import atomic_folder, atomic_path, read_json, user_path, write_json


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


def test_unreadable_json_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(DataError, match=r"x\.json: not valid JSON"):
        read_json(tmp_path / "x.json", DataError)
    with pytest.raises(CheckpointError, match=r"y\.json: the file is missing"):
        read_json(tmp_path / "y.json")


def test_a_second_maker_of_a_folder_is_refused(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "bundle") as part:
        (part / "file").write_text("first")
        with (
            pytest.raises(ConfigError, match="is writing a new bundle here"),
            atomic_folder(tmp_path / "bundle"),
        ):
            pass
    assert (tmp_path / "bundle" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_options_know_the_users_home(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    parser = ArgumentParser()
    parser.add_argument("--out", type=user_path)
    assert parser.parse_args(["--out=~/x"]).out == Path("/home/somebody/x")
    assert parser.parse_args(["--out", "./~/x"]).out == Path("~/x")
    with pytest.raises(SystemExit):
        parser.parse_args(["--out=~nobody-of-this-name/x"])
    assert "invalid user_path value" in capsys.readouterr().err

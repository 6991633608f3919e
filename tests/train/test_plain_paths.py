"""Run folders of any name: what is written there is read again, or nothing is trained."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from commands import SETTINGS, exit_codes, start_together

import prime_jax
from prime_jax.config import Config
from prime_jax.errors import CheckpointError
from prime_jax.export.verification import main as verify
from prime_jax.models.prime import PredictorConfig
from prime_jax.train import checkpoints, plain_paths
from prime_jax.train.__main__ import main
from prime_jax.train.optim import make_optimizer
from prime_jax.train.plain_paths import plain_path
from prime_jax.train.state import TrainState, init_state

PLAIN = [
    "plain",
    "a b",
    "~home",
    "tab\tnew\nline",
    "größe 日本",
    "a:b",
    "100%25",
    "$HOME",
    "#1",
    "a'b\"c",
    "!{x}",
]
SPECIAL = ["exp [v2]", "[!a]", "a[b", "a]b", "back\\slash", "st*r", "wh?t", "gs:", "\udcff", "a\\[*]?"]


@pytest.mark.parametrize("name", PLAIN)
def test_most_names_are_used_as_they_are(tmp_path: Path, name: str) -> None:
    with plain_path(tmp_path / name / "x") as path:
        assert path == tmp_path / name / "x"


@pytest.mark.parametrize("name", SPECIAL)
def test_what_is_written_under_any_name_is_read_again(tmp_path: Path, name: str) -> None:
    """Siblings that a pattern would find as well hold something else."""
    for neighbour in ("exp v", "stXr", "what"):
        (tmp_path / neighbour / "checkpoints" / "1" / "params" / "ocdbt.process_9").mkdir(parents=True)
    folder = tmp_path / name / "checkpoints"
    folder.mkdir(parents=True)
    with plain_path(folder) as path:
        assert path != folder
        assert path.is_absolute()
        assert plain_paths._special(path) is None
        (path / "file").write_text(name, errors="surrogateescape")
        link = path
    assert (folder / "file").read_text(errors="surrogateescape") == name
    assert not link.parent.exists()


def test_two_dots_lead_where_the_system_says(tmp_path: Path) -> None:
    """`link/..` is the parent of where the link leads; read as text it would be another folder."""
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    with plain_path(tmp_path / "link" / "..") as path:
        assert path.resolve() == tmp_path / "far"


@pytest.mark.parametrize("name", ["exp [v2]", "back\\slash*?"])
def test_a_run_in_such_a_folder_is_whole(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Trained, verified, loaded, resumed, in a folder below such a name."""
    out = tmp_path / name / "run"
    options = [*SETTINGS, "--data.path", str(data_folder), "--train.num-epochs", "1"]
    assert main([*options, "--out", str(out)]) == 0
    assert main([*options, "--out", str(out), "--resume"]) == 0
    capsys.readouterr()
    assert verify([str(out)]) == 0
    assert "params, state restored" in capsys.readouterr().out
    shutil.copytree(out, tmp_path / "plain")
    query = np.eye(24, dtype=np.float32)[:2]
    found = [
        prime_jax.load(run, precision="float32", batch_sizes=(1,)).predict(query[:, None], query)
        for run in (out, tmp_path / "plain")
    ]
    np.testing.assert_array_equal(*found)


def test_what_verifies_can_be_restored(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints that an earlier version wrote to such a path: every SHA-256 fits, nothing can be read."""
    out = tmp_path / "exp [v2]"
    options = [*SETTINGS, "--data.path", str(data_folder), "--train.num-epochs", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(plain_paths, "_special", lambda path: None)
        assert main([*options, "--out", str(out)]) == 0
    capsys.readouterr()
    assert verify([str(out)]) == 1
    said = capsys.readouterr()
    assert "every SHA-256 as in manifest.json" in said.out
    assert "params: cannot be restored" in said.err


SAVED = {"epoch": 1.0, "metrics": {"MRR@10": 0.5}, "encoder": "e", "data_hash": "d"}


def small_state(step: int) -> tuple[TrainState, Config]:
    model = PredictorConfig(input_dim=6, output_dim=6, hidden_dim=128, num_layers=1, num_heads=2)
    config = Config(model=model)
    return replace(
        init_state(model, make_optimizer(config.train, 9), seed=step), step=jnp.int32(step)
    ), config


@pytest.mark.parametrize("cleaned", ["home", "link", "replaced"])
def test_a_link_that_was_cleaned_away_is_made_again(tmp_path: Path, cleaned: str) -> None:
    """Temporary folders are cleaned by age, and a run may take weeks."""
    with checkpoints.Checkpoints(tmp_path / "[v2]") as saver:
        saver.save(*small_state(1), SAVED)
        saver.wait()
        link = Path(saver._manager.directory)
        link.unlink()
        if cleaned == "home":
            link.parent.rmdir()
        elif cleaned == "replaced":
            link.mkdir()
        saver.save(*small_state(2), SAVED)
    newest = checkpoints.latest(tmp_path / "[v2]")
    assert newest is not None
    assert newest.step == 2
    assert int(checkpoints.restore(newest, small_state(9)[0])[0].step) == 2
    assert not link.parent.exists()


def test_a_checkpoint_whose_arrays_went_elsewhere_is_none_and_drops_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "relink", lambda *_: None)
    run = tmp_path / "[v2]"
    with checkpoints.Checkpoints(run) as saver:
        saver.save(*small_state(1), SAVED)
        saver.wait()
        link = Path(saver._manager.directory)
        link.unlink()
        link.mkdir()
        saver.save(*small_state(2), SAVED)
        with pytest.raises(CheckpointError, match="state were not written there; earlier ones are as"):
            saver.wait()
    (kept,) = checkpoints.list_checkpoints(run)
    assert int(checkpoints.restore(kept, small_state(9)[0])[0].step) == 1


def test_a_name_that_cannot_be_made_to_work_is_refused_before_training(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no links here")

    options = [*SETTINGS, "--data.path", str(data_folder), "--out", str(tmp_path / "[v2]")]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "symlink_to", refuse)
        assert main(options) == 2
    assert "[v2]: checkpoints in a path with '[' could not be read again" in capsys.readouterr().err
    monkeypatch.setattr(plain_paths.tempfile, "tempdir", str(tmp_path / "*"))
    (tmp_path / "*").mkdir()
    with pytest.raises(CheckpointError, match="has such a name, too; set TMPDIR"), plain_path(tmp_path / "?"):
        pass
    assert not (tmp_path / "[v2]").exists()
    assert list((tmp_path / "*").iterdir()) == []


def test_several_processes_write_there_together(data_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "[v2]"
    options = [*SETTINGS, "--data.path", str(data_folder), "--train.num-epochs", "1", "--mesh.fsdp", "2"]
    options += ["--mesh.data", "1"]
    assert exit_codes(start_together(2, options, out)) == [0, 0], (tmp_path / "[v2]-0.log").read_text()
    newest = checkpoints.latest(out)
    assert newest is not None
    assert checkpoints.check_restorable(newest.folder) == ["params", "state"]

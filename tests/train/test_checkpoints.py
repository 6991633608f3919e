"""Checkpoints come back exactly, and damage never passes."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prime_jax import manifest
from prime_jax.config import Config
from prime_jax.errors import CheckpointError
from prime_jax.models.prime import PredictorConfig
from prime_jax.train import checkpoints
from prime_jax.train.checkpoints import Checkpoint
from prime_jax.train.optim import make_optimizer
from prime_jax.train.state import TrainState, init_state, pure_params

MODEL = PredictorConfig(
    input_dim=6,
    output_dim=6,
    hidden_dim=128,
    num_layers=1,
    num_heads=2,
    max_context_length=3,
    residual="copy",
)
CONFIG = Config(model=MODEL)


def make_state(step: int) -> TrainState:
    state = init_state(MODEL, make_optimizer(CONFIG.train, 100), seed=step)
    return replace(state, step=jnp.int32(step))


def save(run: Path, step: int, score: float) -> Checkpoint:
    facts = {"epoch": 1.0, "metrics": {"MRR@10": score}, "encoder": "e", "data_hash": "d"}
    return checkpoints.save(run, make_state(step), CONFIG, facts)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save(folder, 3, 0.5)
    return folder


def test_round_trip_is_exact(run: Path) -> None:
    newest = checkpoints.latest(run)
    assert newest is not None
    state, negatives = checkpoints.restore(newest, make_state(99))
    assert negatives is None
    for left, right in zip(jax.tree.leaves(state), jax.tree.leaves(make_state(3)), strict=True):
        np.testing.assert_array_equal(left, right)


def test_inference_parameters_are_bfloat16_on_disk_and_float32_in_memory(run: Path) -> None:
    model, config, _, head = checkpoints.load_model(run)
    assert config == CONFIG
    assert head is None
    for left, right in zip(
        jax.tree.leaves(pure_params(model)), jax.tree.leaves(make_state(3).params["model"]), strict=True
    ):
        assert left.dtype == jnp.float32
        np.testing.assert_array_equal(left, right.astype(jnp.bfloat16).astype(jnp.float32))


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, score in enumerate([0.1, 0.9, 0.3, 0.2], start=1):
        save(tmp_path, step, score)
    assert [kept.step for kept in checkpoints.list_checkpoints(tmp_path)] == [2, 4]
    assert checkpoints.best(tmp_path).step == 2


@pytest.mark.parametrize("read_before", [False, True])
def test_one_that_training_removes_while_it_is_read_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_before: bool
) -> None:
    """A service may look for the newest checkpoint of a run that goes on."""
    for step, score in ((1, 0.9), (2, 0.1)):
        save(tmp_path, step, score)
    old = checkpoints.checkpoints_folder(tmp_path) / "1" / "manifest.json"
    real = manifest.read_json

    def racing(path: Path) -> object:
        value = real(path) if read_before else None
        old.unlink(missing_ok=True)
        return value if read_before else real(path)

    monkeypatch.setattr(manifest, "read_json", racing)
    assert [kept.step for kept in checkpoints.list_checkpoints(tmp_path)] == [2]


def test_a_checkpoint_cut_off_while_writing_is_ignored_and_replaced(tmp_path: Path) -> None:
    save(tmp_path, 1, 0.2)
    (save(tmp_path, 2, 0.1).folder / "manifest.json").unlink()
    newest = checkpoints.latest(tmp_path)
    assert newest is not None
    assert newest.step == 1
    assert save(tmp_path, 2, 0.1).step == 2


def test_any_flipped_byte_in_any_file_is_caught(run: Path) -> None:
    newest = checkpoints.latest(run)
    assert newest is not None
    rng = np.random.default_rng(0)
    files = [file for file in newest.folder.rglob("*") if file.is_file() and file.stat().st_size]
    assert len(files) > 5
    for file in files:
        data = file.read_bytes()
        broken = bytearray(data)
        broken[rng.integers(len(data))] ^= 0x10
        file.write_bytes(broken)
        with pytest.raises(CheckpointError):
            checkpoints.restore(newest, make_state(3))
        file.write_bytes(data)
    checkpoints.restore(newest, make_state(3))


def test_any_flipped_byte_is_caught_on_load(tmp_path: Path) -> None:
    """In every file, at random places, whether it is loaded to predict or to resume."""
    folder = save(tmp_path, 3, 0.5).folder
    like, rng = make_state(99), np.random.default_rng(0)
    files = [file for file in folder.rglob("*") if file.is_file() and file.stat().st_size]
    assert len(files) > 15
    for file in files:
        whole = file.read_bytes()
        for place in rng.integers(0, len(whole), 2):
            data = bytearray(whole)
            data[place] ^= int(rng.integers(1, 256))
            file.write_bytes(data)
            with pytest.raises(CheckpointError, match=file.name):
                checkpoints.load_model(folder)
            with pytest.raises(CheckpointError, match=file.name):
                checkpoints.restore(Checkpoint(folder, {"step": 3}), like)
        file.write_bytes(whole)
    checkpoints.load_model(folder)


def test_another_structure_is_refused(run: Path) -> None:
    newest = checkpoints.latest(run)
    assert newest is not None
    wider = MODEL.model_copy(update={"hidden_dim": 256})
    like = init_state(wider, make_optimizer(CONFIG.train, 100), seed=0)
    with pytest.raises(CheckpointError, match="cannot be restored into this model"):
        checkpoints.restore(newest, like)


def test_an_unwritable_folder_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path, 1, 0.1)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert checkpoints.latest(tmp_path) is None
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        checkpoints.load_model(tmp_path)

"""Fault injection on real runs: killed without warning, a disk that is full."""

import hashlib
import random
import resource
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from commands import SETTINGS, newest_step, start

from prime_jax.config import Config
from prime_jax.errors import CheckpointError
from prime_jax.train import checkpoints, loop, program
from prime_jax.train.checkpoints import load_model
from prime_jax.train.state import pure_params

KILLS = 20
READY = "memory of a step"  # what a run says when it is about to train


def fingerprint(run: Path) -> str:
    """SHA-256 of the final weights, to the bit."""
    newest = checkpoints.latest(run)
    assert newest is not None
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(pure_params(load_model(newest.folder).model)):
        digest.update(np.asarray(leaf).tobytes())
    return f"{newest.step} {digest.hexdigest()}"


def test_killed_twenty_times_a_run_ends_as_if_never_disturbed(data_folder: Path, tmp_path: Path) -> None:
    """kill -9 at random moments: while compiling, stepping, mining, validating, writing checkpoints."""
    options = [
        *SETTINGS,
        *("--data.path", str(data_folder), "--mesh.data", "1", "--train.num-epochs", "30"),
        *("--train.mined-negatives", "2", "--train.params-dtype", "float32"),
        *("--train.eval-every-epochs", "6", "--monitor.log-every", "1"),
    ]
    often = [*options, "--train.save-every-steps", "2"]  # the undisturbed run saves where it validates
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    cache = tmp_path / "compiled"  # every life after the first starts faster
    assert start(options, whole, cache=cache).wait(timeout=300) == 0

    moments = random.Random(0)
    log = tmp_path / "broken.log"
    reached = []
    for life in range(KILLS):
        reached.append(newest_step(broken))
        process = start(often, broken, *(["--resume"] if reached[-1] else []), cache=cache, log=log)
        lives = life + 1
        while log.read_text().count(READY) < lives and process.poll() is None:
            time.sleep(0.02)
        while life % 2 and newest_step(broken) == reached[-1] and process.poll() is None:
            time.sleep(0.02)  # every other life gets further, however slow the machine
        time.sleep(moments.uniform(0, 0.5 if life % 2 else 2))
        process.kill()
        process.wait()
        log.write_text(f"{READY}\n" * lives)  # so that the next life is recognised, wherever this one died
    assert len(set(reached)) >= 10  # the kills fell on different checkpoints
    assert start(often, broken, "--resume", cache=cache).wait(timeout=300) == 0
    assert fingerprint(broken) == fingerprint(whole)
    assert len(checkpoints.list_checkpoints(broken)) <= 2
    folders = {path.name for path in checkpoints.checkpoints_folder(broken).iterdir()}
    assert folders == {kept.folder.name for kept in checkpoints.list_checkpoints(broken)}


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint_before(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system refuses to write more than 4 kB to a file, from step 7 on."""
    real, seen = program.split_batch, []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def counting(*args: Any) -> Any:
        seen.append(1)
        if len(seen) == 7:
            deadline = time.monotonic() + 60  # the checkpoint of step 5 is written beside the steps
            while not checkpoints.list_checkpoints(tmp_path):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        return real(*args)

    monkeypatch.setattr(program, "split_batch", counting)
    try:
        with pytest.raises(CheckpointError, match=r"could not be written|cannot be written"):
            loop.train(config, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    kept = checkpoints.list_checkpoints(tmp_path)
    assert [one.step for one in kept] == [5]
    outcome = loop.train(config, tmp_path, resume=True)  # with room again it goes on
    assert outcome.step == 10

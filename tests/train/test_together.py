"""Real runs in several processes: the same curve, one checkpoint, resumed by another number of them."""

import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import SETTINGS, exit_codes, figures, newest_step, start, start_together

from prime_jax.evaluate.run import evaluate_run
from prime_jax.train import checkpoints
from prime_jax.train.checkpoints import load_model
from prime_jax.train.state import pure_params

NAMES = ("loss", "gradient_norm", "negatives", "MRR@10", "learning_rate")
EVERYTHING = (
    *("--train.mined-negatives", "2", "--train.temperature-schedule", "learned"),
    *("--train.micro-batch-size", "4", "--monitor.log-every", "1", "--train.params-dtype", "float32"),
    *("--model.use-torch-compile", "false"),  # of the one evaluation
)


@pytest.fixture(scope="module")
def options(data_folder: Path) -> list[str]:
    return [*SETTINGS, "--mesh.data", "-1", "--data.path", str(data_folder), *EVERYTHING]


@pytest.fixture(scope="module")
def alone(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process on one device."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert start(options, run).wait(timeout=300) == 0
    return run


def assert_same_run(one: Path, other: Path) -> None:
    for name, values in figures(one, *NAMES).items():
        np.testing.assert_allclose(figures(other, name)[name], values, rtol=2e-4, err_msg=name)
    for left, right in zip(weights_of(one), weights_of(other), strict=True):
        np.testing.assert_allclose(right, left, atol=2e-4)


def weights_of(run: Path) -> list[np.ndarray]:
    """Final weights but the biases of keys: a softmax does not see them, so AdamW steps on mere rounding."""
    newest = checkpoints.latest(run)
    assert newest is not None
    params = pure_params(load_model(newest.folder).model)
    for layer in params["layers"].values():
        bias = layer["attention"]["in_proj"]["bias"]
        layer["attention"]["in_proj"]["bias"] = np.delete(bias, slice(len(bias) // 3, 2 * len(bias) // 3))
    return jax.tree.leaves(params)


@pytest.mark.parametrize(("count", "devices", "mesh"), [(2, 1, 1), (2, 2, 2), (4, 1, 4)])
def test_processes_learn_what_one_learns(
    alone: Path, options: list[str], tmp_path: Path, count: int, devices: int, mesh: int
) -> None:
    """Two and four processes, one and two devices each, weights whole and in shares (mesh.fsdp)."""
    run = tmp_path / "run"
    processes = start_together(count, options, run, "--mesh.fsdp", str(mesh), devices=devices)
    assert exit_codes(processes) == [0] * count
    assert_same_run(alone, run)
    said = [(tmp_path / f"run-{index}.log").read_text() for index in range(count)]
    assert "finished after 10 steps" in said[0]
    assert f"{count * devices} device(s) of {count} processes" in said[0]


def test_a_stopped_run_of_two_processes_is_resumed_by_four_and_evaluated_by_one(
    alone: Path, options: list[str], data_folder: Path, tmp_path: Path
) -> None:
    """A signal to one process stops both; each step is saved, so that there is time to send it."""
    run, slow = tmp_path / "run", ("--train.save-every-steps", "1")
    processes = start_together(2, options, run, *slow)
    while newest_step(run) == 0 and processes[0].poll() is None:
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    assert exit_codes(processes) == [130, 130]
    stopped = checkpoints.latest(run)
    assert stopped is not None
    assert stopped.step < 10
    assert exit_codes(start_together(4, options, run, *slow, "--resume")) == [0] * 4
    assert f"resuming from step {stopped.step} of 10" in (tmp_path / "run-0.log").read_text()
    assert_same_run(alone, run)
    report = evaluate_run(run, data_folder, "test", tmp_path / "report", encoder="fakes:encoder")
    assert report["run"]["step"] == checkpoints.best(run).step

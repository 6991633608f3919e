"""Figures reach TensorBoard and Weights & Biases, and a broken tracker stops nobody."""

import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import history

from prime_jax.config import Config, MonitorConfig
from prime_jax.errors import ConfigError
from prime_jax.train import loop
from prime_jax.train.trackers import open_trackers


def test_nothing_is_opened_that_nobody_asked_for(tmp_path: Path) -> None:
    with open_trackers(Config(), tmp_path) as tracker:
        tracker.log(1, {"loss": 2.0})
    assert list(tmp_path.iterdir()) == []


def events(folder: Path) -> list[tuple[int, str, float]]:
    """(step, name, value) of every figure in TensorBoard's files: length, checksum, event, checksum, ..."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(folder.iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            at += length + 16
    return found


def test_a_real_run_writes_tensorboard_events(config: Config, tmp_path: Path) -> None:
    loop.train(config.model_copy(update={"monitor": MonitorConfig(tensorboard=True)}), tmp_path)
    written = [row for row in history(tmp_path) if "loss" in row]
    shown = {(step, name): value for step, name, value in events(tmp_path / "tensorboard")}
    for row in written:
        for name in ("loss", "chance", "gradient_norm", "negatives", "samples_per_second"):
            assert shown[row["step"], name] == pytest.approx(row[name], rel=1e-6)
    assert any(name == "MRR_10" for _, name in shown)


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"wandb is not installed.*prime-jax\[track\]"):
        open_trackers(Config(monitor=MonitorConfig(wandb="mine")), tmp_path)


def test_wandb_goes_on_in_the_same_run_and_a_failure_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A double of the package, as the real one wants an account."""
    begun: list[dict[str, Any]] = []
    sent: list[tuple[int, dict[str, float]]] = []

    def log(figures: dict[str, float], step: int) -> None:
        if step == 3:
            raise OSError("the network is gone")
        sent.append((step, figures))

    def init(**options: Any) -> SimpleNamespace:
        begun.append(options)
        return SimpleNamespace(log=log, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    config = Config(monitor=MonitorConfig(wandb="mine"))
    for steps in ((1, 2), (3, 4)):
        with open_trackers(config, tmp_path) as tracker:
            for step in steps:
                tracker.log(step, {"loss": float(step)})
    assert sent == [(1, {"loss": 1.0}), (2, {"loss": 2.0})]
    assert capsys.readouterr().err.count("wandb failed and is left out from now on") == 1
    assert begun[0]["id"] == begun[1]["id"]
    assert begun[0]["resume"] == "allow"
    assert begun[0]["config"]["monitor"]["wandb"] == "mine"

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


def read(folder: Path) -> list[Any]:
    """All events of TensorBoard's files, oldest first: length, checksum, event, checksum, and so on."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(folder.iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += length + 16
    return found


def test_a_resumed_run_hides_what_it_makes_again(tmp_path: Path) -> None:
    """TensorBoard forgets steps from the one of a `START` on; a killed run had logged past its checkpoint."""
    from tensorboardX.proto.event_pb2 import SessionLog

    config = Config(monitor=MonitorConfig(tensorboard=True))
    for resumed_at in (0, 2):
        with open_trackers(config, tmp_path, resumed_at=resumed_at) as tracker:
            for step in range(resumed_at + 1, resumed_at + 4):
                tracker.log(step, {"loss": float(step)})
    starts = [
        event.step for event in read(tmp_path / "tensorboard") if event.session_log.status == SessionLog.START
    ]
    assert starts == [3]


def test_a_real_run_writes_tensorboard_events(config: Config, tmp_path: Path) -> None:
    loop.train(config.model_copy(update={"monitor": MonitorConfig(tensorboard=True)}), tmp_path)
    written = [row for row in history(tmp_path) if "loss" in row]
    shown = {
        (event.step, value.tag): value.simple_value
        for event in read(tmp_path / "tensorboard")
        for value in event.summary.value
    }
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
            raise OSError("the network [/api] is gone")  # rich would take the brackets for its own
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
    warning = "wandb failed and is left out from now on: the network [/api] is gone\n"
    assert capsys.readouterr().err.count(warning) == 1
    assert begun[0]["id"] == begun[1]["id"]
    assert begun[0]["resume"] == "allow"
    assert begun[0]["config"]["monitor"]["wandb"] == "mine"


def test_an_account_that_is_missing_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: Any) -> None:
        raise RuntimeError("No API key configured.")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with pytest.raises(ConfigError, match=r"wandb cannot begin \(No API key configured.\); set WANDB_MODE"):
        open_trackers(Config(monitor=MonitorConfig(wandb="mine")), tmp_path)


def test_the_real_wandb_keeps_a_run_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with open_trackers(Config(monitor=MonitorConfig(wandb="mine")), tmp_path) as tracker:
        tracker.log(1, {"a_loss_to_find": 2.0})
    wandb.teardown()  # its own process writes, and may be a moment behind
    (kept,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"a_loss_to_find" in kept.read_bytes()

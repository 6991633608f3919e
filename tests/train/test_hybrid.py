"""Watched runs through the real command: jumps, resuming, going back, and what is refused."""

import json
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import fakes
import jax
import numpy as np
import pytest
from commands import SETTINGS, history
from jax.experimental.compilation_cache import compilation_cache

from prime_jax.config import HybridSection, read_config
from prime_jax.data.control import conversations, with_control
from prime_jax.errors import CheckpointError, ConfigError, DataError, PredictorError
from prime_jax.hybrid.settings import HybridConfig
from prime_jax.train import checkpoints, loop, program
from prime_jax.train.__main__ import main
from prime_jax.train.checkpoints import load_model
from prime_jax.train.setup import hybrid_settings, prepared
from prime_jax.train.state import pure_params

STEPS = 15  # 5 per epoch: 50 rows in whole conversations of 5, 10 of them set aside
WATCHED = {
    "enabled": "true",
    "control-batches": "1",
    "window": "2",
    "warmup-steps": "4",
    "min-full-steps": "4",
    "max-full-steps": "8",
    "ema-steps": "[2, 4]",
    "horizons": "[0, 2, 4]",
    "probe-share": "1",
    "confidence-threshold": "0",
    "coefficient-gradients": "2",
    "snapshot": "window",
    "ensemble": "1",
    "hidden": "8",
    "latent": "2",
}


LIGHT = ["--train.num-epochs", "3", "--train.eval-every-epochs", "3", "--mesh.data", "1"]


def options(data: Path, **changed: str) -> list[str]:
    """Of a small watched run."""
    given = {**WATCHED, **{name.replace("_", "-"): value for name, value in changed.items()}}
    words = [word for name, value in given.items() for word in (f"--hybrid.{name}", value)]
    return [*SETTINGS, "--data.path", str(data), *LIGHT, *words]


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The runs of this file share what they compile."""
    new = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in new}
    try:
        for name, value in new.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    fakes.write_conversations(folder, chats=14)
    return folder


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A watched run that nothing happened to."""
    run = tmp_path_factory.mktemp("watched") / "run"
    assert main([*options(data), "--out", str(run)]) == 0
    return run


def weights(run: Path) -> list[np.ndarray]:
    newest = checkpoints.latest(run)
    assert newest is not None
    return jax.tree.leaves(pure_params(load_model(newest.folder).model))


def assert_same(one: Path, other: Path) -> None:
    for left, right in zip(weights(one), weights(other), strict=True):
        np.testing.assert_array_equal(left, right)


def told(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "hybrid.json").read_text())
    return found


def test_the_section_has_the_fields_and_defaults_of_its_part() -> None:
    assert HybridSection().model_dump() == {**asdict(HybridConfig()), "enabled": False}


def test_a_watched_run_jumps_and_leaves_its_report(whole: Path) -> None:
    assert [row["step"] for row in history(whole) if "MRR@10" in row][-1] == STEPS
    report = told(whole)
    jumps = [row for row in report["rows"] if "after" in row]
    assert report["totals"]["steps"] == STEPS
    assert report["totals"]["jumps"] == len(jumps) > 1
    assert jumps[-1]["horizon"] == 0  # the end of the run
    assert all(row["after"] <= row["before"] for row in jumps)
    rows = [json.loads(line) for line in (whole / "hybrid.jsonl").read_text().splitlines()]
    assert rows == report["rows"]
    assert 0 < history(whole)[-1]["as trained MRR@10"] <= 1  # beside the figure after the correction
    last = [row for row in history(whole) if "loss" in row][-1]
    assert last["hybrid_jumps"] == len(jumps) - 1
    assert {"hybrid_phase", "hybrid_saved", "hybrid_overhead", "hybrid_confidence_2"} <= last.keys()
    assert (whole / "hybrid.csv").read_text().startswith("step,phase,loss")
    assert (whole / "hybrid.png").read_bytes().startswith(b"\x89PNG")


def test_stopped_inside_a_window_and_resumed_equals_never_stopped(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "run"
    with monkeypatch.context() as patch:
        asked_after(9, patch)
        assert main([*options(data), "--out", str(broken)]) == 130
    assert main(["--resume", "--out", str(broken)]) == 0
    assert_same(broken, whole)
    assert told(broken) == told(whole)


def asked_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the run asked to stop after so many steps."""
    real = loop._Run._step

    def counting(self: Any, step: int, pending: list[Any]) -> int:
        made = real(self, step, pending)
        if made == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return made

    monkeypatch.setattr(loop._Run, "_step", counting)


def poison(monkeypatch: pytest.MonkeyPatch, *calls: int) -> list[int]:
    """Make the batches of these calls of the compiled step no numbers; gives the list of calls."""
    real, seen = program.TrainingProgram.__call__, []

    def poisoned(self: Any, state: Any, batch: Any) -> Any:
        seen.append(1)
        bad = np.float32(math.nan if len(seen) in calls else 1)
        return real(self, state, batch._replace(query=batch.query * bad))

    monkeypatch.setattr(program.TrainingProgram, "__call__", poisoned)
    return seen


def test_a_loss_that_is_no_number_goes_back_with_rng_and_data(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step is broken once, dropout is on; the run ends as if nothing had been."""
    words = [*options(data, predict="false"), "--monitor.log-every", "1"]
    clean, hurt = tmp_path / "clean", tmp_path / "hurt"
    assert main([*words, "--out", str(clean)]) == 0
    with monkeypatch.context() as patch:
        calls = poison(patch, 7)
        assert main([*words, "--out", str(hurt)]) == 0
    assert len(calls) == STEPS + 2  # one window again
    assert "no finite number (critical) up to step 8, back to step 6" in capsys.readouterr().err
    assert_same(hurt, clean)
    assert told(hurt)["totals"]["rollbacks"] == 1
    steps = [[row["step"] for row in history(run)] for run in (hurt, clean)]
    assert steps[0] == steps[1]


def test_a_loss_that_stays_no_number_ends_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Retried, then left out, then given up; examples are named, the last good state is kept and goes on."""
    config = read_config(None, options(data, predict="false"))
    with monkeypatch.context() as patch:
        poison(patch, *range(7, 99))
        with pytest.raises(PredictorError, match=r"loss nan .* in step 7: .* Its batch: "):
            loop.train(config, tmp_path)
    assert [kept.step for kept in checkpoints.list_checkpoints(tmp_path)] == [6]
    capsys.readouterr()
    assert loop.train(config, tmp_path, resume=True).step == STEPS
    assert "6 has no hybrid state: weights and data go on, watching begins anew" in capsys.readouterr().err
    assert told(tmp_path)["totals"]["steps"] == STEPS


def test_a_hybrid_state_of_another_structure_is_told_from_none(whole: Path, tmp_path: Path) -> None:
    newest = checkpoints.latest(whole)
    assert newest is not None
    with pytest.raises(CheckpointError, match="hybrid: cannot be restored"):
        checkpoints.restore_hybrid(newest, {"arrays": jax.numpy.zeros(3)})
    assert checkpoints.restore_hybrid(replace(newest, folder=tmp_path), {}) is None


def test_watching_nothing_changes_nothing(data: Path, tmp_path: Path) -> None:
    plain, idle = tmp_path / "plain", tmp_path / "idle"
    words = [*SETTINGS, "--data.path", str(data), "--train.num-epochs", "1", "--mesh.data", "1"]
    assert main([*words, "--out", str(plain)]) == 0
    off = ["--hybrid.enabled", "true", "--hybrid.predict", "false", "--hybrid.correct", "false"]
    assert main([*words, *off, "--out", str(idle)]) == 0
    assert_same(plain, idle)
    assert not list(idle.glob("hybrid*"))
    assert not any(name.startswith("hybrid") for row in history(idle) for name in row)


def test_the_control_set_is_made_of_whole_conversations(data: Path) -> None:
    config = read_config(None, [*SETTINGS, "--data.path", str(data)])
    before = prepared(config).data
    after = with_control(before, 8, seed=3, all_positives=False)
    train, control = after.splits["train"], after.splits["control"]
    assert sorted([*train.ids, *control.ids]) == sorted(before.splits["train"].ids)
    assert len(control) == 10  # two conversations of five
    chats = [{name.split("-")[0] for name in part.ids} for part in (train, control)]
    assert not chats[0] & chats[1]
    assert len(np.unique(conversations(before))) == len(chats[0]) + len(chats[1])
    again = with_control(before, 8, seed=3, all_positives=False)
    assert again.splits["control"].ids == control.ids
    assert with_control(before, 8, seed=4, all_positives=False).splits["control"].ids != control.ids
    with pytest.raises(DataError, match=r"that would be 30 of 50 rows .* lower hybrid\.control_batches"):
        with_control(before, 30, seed=0, all_positives=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--train.average-weights", "0.9"], r"train\.average_weights is 0\.9"),
        (["--train.target", "ema"], r"train\.target 'ema'"),
        (["--train.x-encoder", "trained"], r"train\.x_encoder is 'trained'"),
        (["--train.accumulate-grad-batches", "2"], r"hybrid\.window 5 is no multiple"),
        (["--model.kind", "jasper"], r"prime models; a jasper model"),
        (["--hybrid.confidence-threshold", "2"], r"confidence_threshold"),
        (["--hybrid.windows", "2"], r"--hybrid\.windows.*did you mean --hybrid\.window"),
    ],
)
def test_what_does_not_go_together_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_config(None, ["--hybrid.enabled", "true", *words])


def test_numbers_that_contradict_each_other_are_refused_before_any_data() -> None:
    config = read_config(None, ["--hybrid.enabled", "true", "--hybrid.horizons", "[0, 5, 500]"])
    with pytest.raises(ConfigError, match="horizons reach at most 12 windows"):
        hybrid_settings(config)

"""A run folder has one training at a time, whoever starts the second one, and wherever."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import SETTINGS, exit_codes, start_together

from prime_jax.config import Config
from prime_jax.errors import CheckpointError, ConfigError
from prime_jax.evaluate.__main__ import main as evaluate
from prime_jax.export.__main__ import main as export
from prime_jax.locks import OWNER, Owner, exclusive
from prime_jax.train import checkpoints, loop, program, setup, sweep
from prime_jax.train.__main__ import main


@pytest.fixture(scope="module")
def undisturbed(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert (
        main([*SETTINGS, "--data.path", str(data_folder), "--train.num-epochs", "1", "--out", str(run)]) == 0
    )
    return run


def test_a_second_training_is_refused_while_the_first_goes_on(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Today's fault: both ended with 0, one result was lost, and the history was interleaved."""
    out, real, codes = tmp_path / "run", program.split_batch, []

    def starting_another(*args: Any) -> Any:
        if not codes:
            codes.append(-1)
            codes[0] = main([*settings, "--train.seed", "1", "--out", str(out)])
        return real(*args)

    monkeypatch.setattr(program, "split_batch", starting_another)
    assert main([*settings, "--out", str(out)]) == 0
    assert codes == [2]
    refusal = capsys.readouterr().err
    assert f"prime-jax train: {out}: process {os.getpid()} on {Owner.here().host} (since" in refusal
    steps = [json.loads(line)["step"] for line in (out / "history.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert "seed: 0 " in (out / "config.yaml").read_text()
    assert not (out / OWNER).exists()
    assert main([*settings, "--out", str(out), "--resume"]) == 0  # free again


def test_a_run_that_ended_meanwhile_is_not_started_over(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = []

    def first_only(*args: Any) -> None:
        checked.append(args)
        if len(checked) == 2:
            raise ConfigError("already holds a run")

    monkeypatch.setattr(setup, "check_folder", first_only)
    with pytest.raises(ConfigError, match="already holds a run"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_whose_folder_was_taken_over_saves_nothing(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the machine slept, and another one went on with the run."""
    real = loop._Run._validate

    def taken_over(run: Any, step: int) -> Any:
        other = Owner("elsewhere", "boot", 4711, "2026-01-01T00:00:00")
        (tmp_path / OWNER).write_text(json.dumps(other._asdict()))
        return real(run, step)

    monkeypatch.setattr(loop._Run, "_validate", taken_over)
    with pytest.raises(ConfigError, match=r"process 4711 on elsewhere .* took over a training run"):
        loop.train(config, tmp_path)
    assert checkpoints.list_checkpoints(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_said_to_be(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        loop.train(config, tmp_path / "file" / "run")


def test_a_changed_shard_is_found_at_the_start_and_on_resume(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Noise of the same size trained on, and resumed, without a word."""
    shutil.copytree(data_folder, tmp_path / "data", ignore=shutil.ignore_patterns("embeddings"))
    options = [*SETTINGS, "--data.path", str(tmp_path / "data"), "--train.num-epochs", "1"]
    assert main([*options, "--out", str(tmp_path / "run")]) == 0
    (shard,) = (tmp_path / "data" / "embeddings" / "bag-of-words").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-4000:-3000] = bytes(1000)
    shard.write_bytes(content)
    for words in (["--resume", "--out", str(tmp_path / "run")], ["--out", str(tmp_path / "other")]):
        capsys.readouterr()
        assert main([*options, *words]) == 2
        said = capsys.readouterr().err
        assert f"prime-jax train: {shard}: damaged or changed, its SHA-256 differs from index.json" in said
        assert "encode again" in said
    assert not (tmp_path / "other").exists()


def test_two_sweeps_into_one_folder(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second one removed what the first one trained in."""
    pytest.importorskip("optuna")
    words = ["--out", str(tmp_path / "sweep"), "--trials", "1", "--try", "train.temperature=0.05,0.1"]
    words += [*settings, "--train.num-epochs", "1"]
    real, codes = program.split_batch, []

    def starting_another(*args: Any) -> Any:
        if not codes:
            codes.append(-1)
            codes[0] = sweep.main(words)
        return real(*args)

    monkeypatch.setattr(program, "split_batch", starting_another)
    assert sweep.main(words) == 0
    assert codes == [2]
    assert "is writing a sweep here" in capsys.readouterr().err
    assert {file.name for file in (tmp_path / "sweep").iterdir()} >= {"best.yaml", "results.json"}


def test_a_journal_names_only_what_is_tried() -> None:
    """results[0] becomes best.yaml, which a user may give to --config."""

    def study(**params: Any) -> Any:
        attributes = {"found": [{"value": 0.5, "metrics": {}}]}
        trial = SimpleNamespace(
            params=params, value=0.5, user_attrs=attributes, state=SimpleNamespace(name="COMPLETE")
        )
        return SimpleNamespace(trials=[trial])

    space: sweep.Space = {"train.temperature": sweep.Range(0.01, 0.1, True), "data.encoder": ("minilm", "e5")}
    good = {"train.temperature": 0.05, "data.encoder": "e5"}
    assert sweep._results(study(**good), space)[0]["settings"] == good
    bad = (
        {"data.encoder": "os:abort"},
        {"train.temperature": 1.0},
        {"train.temperature": "x"},
        {"data.path": "/"},
    )
    for change in bad:
        with pytest.raises(ConfigError, match="which is not tried here"):
            sweep._results(study(**(good | change)), space)


def test_two_reports_or_exports_into_one_folder(
    undisturbed: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--run", str(undisturbed), "--encoder", "fakes:encoder", "--out", str(tmp_path / "out")]
    with exclusive(tmp_path / "out", "a report", lock=tmp_path / "out" / ".report.lock"):
        assert evaluate([*run, "--data", str(data_folder)]) == 2
    assert f"{tmp_path / 'out'}: process {os.getpid()}" in capsys.readouterr().err
    with exclusive(tmp_path / "out", "a bundle", lock=tmp_path / ".out.export.lock"):
        assert export(run) == 2
    assert "is writing a bundle here" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_all_processes_of_a_run_are_refused_together(data_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with exclusive(out, "a training run"):
        processes = start_together(2, [*SETTINGS, "--data.path", str(data_folder)], out)
        assert exit_codes(processes) == [2, 2]
    said = [(tmp_path / f"run-{index}.log").read_text() for index in range(2)]
    assert f"process {os.getpid()} on {Owner.here().host}" in said[0]
    assert "the first process may not write here; it says why" in said[1]

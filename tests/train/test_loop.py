"""Real runs through the real command: learn, stop, resume, refuse."""

import csv
import json
import os
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from commands import SETTINGS

import prime_jax
from prime_jax.config import Config, read_config
from prime_jax.errors import CheckpointError, ConfigError, PredictorError
from prime_jax.train import checkpoints, loop, program, validate
from prime_jax.train import interrupt as interrupt_module
from prime_jax.train.__main__ import main
from prime_jax.train.checkpoints import load_model
from prime_jax.train.program import TrainingProgram
from prime_jax.train.setup import prepared, say_how_many_negatives, warn_of_unused
from prime_jax.train.state import pure_params


@pytest.fixture(scope="module")
def undisturbed(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the settings of these tests, as they are."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main([*SETTINGS, "--data.path", str(data_folder), "--out", str(run)]) == 0
    return run


def params_of(run: Path) -> list[np.ndarray]:
    """Parameters of the newest checkpoint, as saved for inference."""
    newest = checkpoints.latest(run)
    assert newest is not None
    return jax.tree.leaves(pure_params(load_model(newest.folder)[0]))


def interrupt_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the process receive Ctrl-C while it works on the given step."""
    real, seen = program.split_batch, []

    def counting(*args: Any) -> Any:
        seen.append(1)
        if len(seen) == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(program, "split_batch", counting)


def test_a_run_learns_and_leaves_everything_behind(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main([*settings, "--train.num-epochs", "8", "--model.residual", "query", "--out", str(run)]) == 0
    assert "finished after 40 steps" in capsys.readouterr().out
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    training, validation = ([row for row in rows if key in row] for key in ("loss", "MRR@10"))
    assert [row["step"] for row in validation] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert training[-1]["loss"] < 0.5 * training[0]["loss"]
    # 8 rows, all with different targets: 7 negatives, chance log 8
    assert training[0]["negatives"] == 7
    assert training[0]["chance"] == pytest.approx(np.log(8), rel=1e-5)
    with (run / "history.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == len(rows)
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    kept = checkpoints.list_checkpoints(run)
    assert kept[-1].step == 40
    assert checkpoints.best(run).score == max(row["MRR@10"] for row in validation)
    predictor = prime_jax.load(run, precision="float32")
    assert predictor.confidence is not None  # fitted on dev and kept with the checkpoint
    foreign = np.zeros(24, np.float32)
    foreign[-1] = 1
    answer = predictor.answer(np.zeros((0, 24), np.float32), foreign)
    assert answer.confidence is not None
    assert 0 < answer.confidence < 1
    assert len(kept) <= 2


def test_the_whole_corpus_as_negatives(settings: list[str], tmp_path: Path) -> None:
    """Every passage but a row's right answers; how the corpus is cut changes nothing."""
    passages = len((Path(settings[-1]) / "corpus.jsonl").read_text().splitlines())
    losses = []
    for chunk in ("7", "8192"):
        run = tmp_path / chunk
        options = ["--train.negatives", "corpus", "--train.corpus-chunk", chunk, "--train.num-epochs", "6"]
        assert main([*settings, *options, "--out", str(run)]) == 0
        rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
        training = [row for row in rows if "loss" in row]
        assert training[0]["negatives"] == passages - 1
        assert training[0]["chance"] == pytest.approx(np.log(passages), rel=1e-5)
        assert training[-1]["loss"] < 0.8 * training[0]["loss"]
        losses.append([row["loss"] for row in training])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


def test_explicit_negatives_beside_the_corpus_are_said_to_do_nothing(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config.train.model_copy(update={"negatives": "corpus", "num_negatives": 2})
    warn_of_unused(config.model_copy(update={"train": settings}))
    assert "train.num_negatives has no effect" in capsys.readouterr().err


def test_bfloat16_remat_and_accumulation_learn_too(settings: list[str], tmp_path: Path) -> None:
    """The requirement's defaults for precision and memory, with context taken from a first search."""
    switches = {
        "--train.mixed-precision": "true",
        "--train.gradient-checkpointing": "true",
        "--train.accumulate-grad-batches": "2",
        "--train.num-epochs": "8",
        "--data.context-from": "search",
        "--data.first-pass-k": "3",
    }
    options = [word for pair in switches.items() for word in pair]
    assert main([*settings, *options, "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]


def test_stopped_and_resumed_equals_never_stopped(
    undisturbed: Path,
    settings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C in the middle of the second epoch; parameters and history end up the same to the bit."""
    broken = tmp_path / "broken"
    with monkeypatch.context() as patch:
        interrupt_after(7, patch)
        assert main([*settings, "--out", str(broken)]) == 130
    assert "stopped at step 7; saved" in capsys.readouterr().out
    assert main(["--resume", "--encoder", "fakes:encoder", "--out", str(broken)]) == 0
    for left, right in zip(params_of(undisturbed), params_of(broken), strict=True):
        np.testing.assert_array_equal(left, right)
    lines = [(run / "history.jsonl").read_text().splitlines() for run in (undisturbed, broken)]
    last = [json.loads(rows[-1]) for rows in lines]
    assert last[0] == last[1]
    validated = [[row for row in map(json.loads, rows) if "MRR@10" in row] for rows in lines]
    assert validated[0] == validated[1]  # those of before the interrupt too


def test_an_interrupt_after_validation_keeps_its_score(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(5, monkeypatch)  # the last step of the first epoch
    outcome = loop.train(config, tmp_path)
    assert (outcome.step, outcome.interrupted) == (5, True)
    assert outcome.checkpoint.score > 0


def test_an_interrupt_before_the_first_step_after_resuming_rewrites_nothing(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The only checkpoint is never deleted in order to be written again."""
    with monkeypatch.context() as patch:
        interrupt_after(7, patch)
        options = [*settings, "--train.y-encoder-lr-multiplier", "0.5"]
        assert main([*options, "--out", str(tmp_path)]) == 130
    assert "has no effect" in capsys.readouterr().err
    newest = checkpoints.latest(tmp_path)
    assert newest is not None
    before = {file: file.stat().st_mtime_ns for file in newest.folder.rglob("*")}

    def interrupted_already() -> Any:
        interrupt = interrupt_module.Interrupt()
        interrupt.asked = True
        return nullcontext(interrupt)

    monkeypatch.setattr(loop, "interruptible", interrupted_already)
    assert main(["--resume", "--encoder", "fakes:encoder", "--out", str(tmp_path)]) == 130
    assert {file: file.stat().st_mtime_ns for file in newest.folder.rglob("*")} == before


def test_resume_refuses_other_settings_other_data_and_empty_folders(
    undisturbed: Path, settings: list[str], config: Config, data_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(CheckpointError, match="no run to resume"):
        loop.train(config, run, resume=True)
    shutil.copytree(undisturbed, run, dirs_exist_ok=True)
    with pytest.raises(ConfigError, match="already holds a run; add --resume"):
        loop.train(config, run)
    with pytest.raises(ConfigError, match=r"train\.seed 0, not 1"):
        loop.train(read_config(None, [*settings, "--train.seed", "1"]), run, resume=True)
    other = tmp_path / "data"
    other.mkdir()
    for file in data_folder.glob("*.jsonl"):
        (other / file.name).write_text(file.read_text().replace("topic1 ", "subject1 "))
    moved = read_config(None, [*settings, "--data.path", str(other)])
    with pytest.raises(CheckpointError, match="data_hash"):
        loop.train(moved, run, resume=True)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = program.split_batch, []

    def poisoned(batch: Any, mesh: Any) -> Any:
        calls.append(1)
        query = batch.query * np.float32(np.nan if len(calls) == 8 else 1)
        return real(batch._replace(query=query), mesh)

    monkeypatch.setattr(program, "split_batch", poisoned)
    said = r"loss nan .* in step 8:.*checkpoint is step 7.*Its batch: \d+-\d, "
    with pytest.raises(PredictorError, match=said):
        loop.train(config, tmp_path)
    assert [kept.step for kept in checkpoints.list_checkpoints(tmp_path)] == [5, 7]
    told = json.loads((tmp_path / "bad_batch_8.json").read_text())
    assert told["step"] == 8
    assert len(told["examples"]) == 8


def test_wrong_dimension_names_the_option(settings: list[str], tmp_path: Path, capsys: Any) -> None:
    assert main([*settings, "--model.input-dim", "16", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "--model.input-dim 24" in said
    assert "Traceback" not in said


def test_print_config_and_missing_out(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--train.seed", "7", "--print-config"]) == 0
    assert "seed: 7" in capsys.readouterr().out
    assert main(settings) == 2
    assert "--out is missing" in capsys.readouterr().err


def test_training_can_start_from_the_weights_of_another_run(
    undisturbed: Path, settings: list[str], tmp_path: Path
) -> None:
    second = tmp_path / "second"
    warm = [*settings, "--model.checkpoint-path", str(undisturbed), "--train.learning-rate", "1e-9"]
    loop.train(read_config(None, warm), second)
    for left, right in zip(params_of(undisturbed), params_of(second), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-2)
    other = [*warm, "--model.hidden-dim", "256"]
    with pytest.raises(ConfigError, match="other shapes"):
        loop.train(read_config(None, other), tmp_path / "third")


def test_every_source_of_negatives_and_all_right_answers(settings: list[str], tmp_path: Path) -> None:
    """Mined anew every second epoch, and passages among the turns; a row then sees more than its batch."""
    options = [
        *(
            "--train.mined-negatives",
            "3",
            "--train.mine-every-epochs",
            "2",
            "--train.context-negatives",
            "true",
        ),
        *("--train.positives", "all", "--train.num-epochs", "6", "--monitor.log-every", "1"),
    ]
    assert main([*settings, *options, "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    training = [row for row in rows if "loss" in row]
    assert all(7 < row["negatives"] <= 7 + 3 + 4 for row in training)
    assert training[-1]["loss"] < 0.8 * training[0]["loss"]
    newest = checkpoints.latest(tmp_path)
    assert newest is not None
    _, mined = checkpoints.restore(newest, TrainingProgram(*program_of(settings, options)).initial_state())
    assert mined is not None
    assert mined.shape[1] == 3
    assert (mined >= 0).any(axis=1).all()


def program_of(settings: list[str], options: list[str]) -> tuple[Config, Any, int]:
    config = read_config(None, [*settings, *options])
    return config, prepared(config).data, 30


def test_a_profile_of_a_few_steps(settings: list[str], tmp_path: Path) -> None:
    assert main([*settings, "--profile", "--out", str(tmp_path)]) == 0
    traces = [file for file in (tmp_path / "profile").rglob("*") if file.is_file()]
    assert any(file.name.endswith(".xplane.pb") and file.stat().st_size > 1000 for file in traces)


def test_accumulation_says_how_many_negatives_a_row_sees(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config.train.model_copy(update={"accumulate_grad_batches": 4})
    say_how_many_negatives(config.model_copy(update={"train": settings}))
    said = capsys.readouterr().err
    assert "from the other 7 of its batch, not from the 32 of an update" in said
    assert "train.micro-batch-size 8" in said


def test_collapsing_predictions_are_said_to_be(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validate, "COLLAPSED", 1e9)
    loop.train(config, tmp_path)
    assert "predictions are collapsing: they spread in" in capsys.readouterr().err

"""Training steered models: from steering data to a run that explains itself."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prime_jax.config import Config, read_config
from prime_jax.data import steering as steering_builder
from prime_jax.data.pipeline import TrainingBatches
from prime_jax.data.records import write_dataset
from prime_jax.data.steered import VARIANTS, ZERO
from prime_jax.errors import ConfigError, DataError, PredictorError
from prime_jax.evaluate.__main__ import main as evaluate
from prime_jax.explain.__main__ import main as explain
from prime_jax.explain.explainer import Explainer
from prime_jax.losses.jasper import ONLINE_ENCODER
from prime_jax.models.subspace import CENTROIDS
from prime_jax.predict.predictor import load
from prime_jax.train import checkpoints, loop
from prime_jax.train.loop import train
from prime_jax.train.setup import prepared, steered_rows
from prime_jax.train.state import MODEL, TrainState
from prime_jax.types import Batch

CLUSTERS = 4
EVERY = (ZERO, *VARIANTS)
TIMES = ("samples_per_second", "mfu")
SETTINGS = [
    *("--model.input-dim", f"{fakes.DIM}", "--model.output-dim", f"{fakes.DIM}", "--model.hidden-dim", "32"),
    *("--model.num-layers", "1", "--model.residual", "query", "--model.use-torch-compile", "false"),
    *("--train.batch-size", "8", "--train.num-epochs", "3", "--train.warmup-steps", "2"),
    *(
        "--train.learning-rate",
        "0.003",
        "--train.mixed-precision",
        "false",
        "--data.encoder",
        "fakes:encoder",
    ),
    *("--monitor.log-every", "2", "--mesh.data", "2"),
]


@pytest.fixture(scope="session")
def steered_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("faiss")
    folder = tmp_path_factory.mktemp("steered")
    fakes.write_conversations(folder, chats=24)
    words = ["--data", str(folder), "--encoder", "fakes:encoder", "--clusters", f"{CLUSTERS}"]
    assert steering_builder.main([*words, "--tiers", "1", "1", "1", "1"]) == 0
    return folder


def settings(data: Path, kind: str = "subspace", *more: str) -> Config:
    own = ["--model.num-subspaces", f"{CLUSTERS}"] if kind == "subspace" else []
    return read_config(None, ["--model.kind", kind, *SETTINGS, "--data.path", str(data), *own, *more])


@pytest.fixture(scope="session")
def run(steered_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "subspace"
    train(settings(steered_data), out)
    return out


def rows_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["jasper", "subspace"])
def test_the_history_shows_losses_schedules_and_steering(
    kind: str, steered_data: Path, tmp_path: Path
) -> None:
    train(settings(steered_data, kind, "--train.num-epochs", "2"), tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    first, last = (next(row for row in order if "loss" in row) for order in (rows, rows[::-1]))
    for name in ("loss", "chance", "jepa", "centroid", "vicreg", "total", "centroid_accuracy"):
        assert np.isfinite(last[name]), name
    shares = [last[f"steering_{name}"] for name in EVERY]
    assert sum(shares) == pytest.approx(1.0, abs=1e-5)
    assert shares[-1] == 0.0  # not among the variants of training
    assert first["ema_decay"] < last["ema_decay"] <= 0.999
    judged = next(row for row in rows[::-1] if "MRR@10" in row)
    assert {f"{name} MRR@10" for name in ("zero", "centroid", "keyword", "residual", "predicted")} <= set(
        judged
    )
    assert ("routing accuracy" in judged) == (kind == "subspace")
    if kind == "subspace":
        assert 0.1 <= last["gumbel_temperature"] < first["gumbel_temperature"] <= 1.0
        assert last["entropy_target"] < first["entropy_target"] <= np.log(CLUSTERS)
        assert 0 < last["router_usage"] <= 1.0


def test_centroids_stay_exact_through_training_and_checkpoints(run: Path, steered_data: Path) -> None:
    known = prepared(settings(steered_data)).steering
    assert known is not None
    model = checkpoints.load_model(run).model
    np.testing.assert_array_equal(np.asarray(model.centroids[...]), known.centroids)


def test_resume_goes_on_exactly_where_it_stopped(
    run: Path, steered_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epoch, curriculum, EMA and history, all as if nobody had stopped the run."""
    config, cut = settings(steered_data), tmp_path / "cut"

    stop = SimpleNamespace(asked=False)
    program = loop.TrainingProgram.__call__

    def counted(self: loop.TrainingProgram, state: TrainState, batch: Batch) -> Any:
        answer = program(self, state, batch)
        stop.asked = stop.asked or int(answer[0].step) == 5
        return answer

    with monkeypatch.context() as patched:
        patched.setattr(loop.TrainingProgram, "__call__", counted)
        patched.setattr(loop, "interruptible", lambda: nullcontext(stop))
        assert train(config, cut).interrupted
    train(config, cut, resume=True)
    states = []
    for folder in (run, cut):
        newest = checkpoints.latest(folder)
        assert newest is not None
        found = loop._Run(config, tmp_path / "new", prepared(config)).state
        states.append(checkpoints.restore(newest, found)[0])
    jax.tree.map(np.testing.assert_array_equal, *states)
    timeless = [
        [{key: value for key, value in row.items() if key not in TIMES} for row in rows_of(folder)]
        for folder in (run, cut)
    ]
    whole, resumed = ({row["step"]: row for row in rows} for rows in timeless)
    assert set(whole) <= set(resumed)
    for step in whole:
        if step > 6:
            assert whole[step] == resumed[step]


def test_the_state_holds_online_and_target_encoder(steered_data: Path, tmp_path: Path) -> None:
    config = settings(steered_data, "jasper", "--train.num-epochs", "1")
    train(config, tmp_path / "run")
    newest = checkpoints.latest(tmp_path / "run")
    assert newest is not None
    fresh = loop._Run(config, tmp_path / "run", prepared(config)).state
    state = checkpoints.restore(newest, fresh)[0]
    online, target, start = state.params[ONLINE_ENCODER], state.average, fresh.params[ONLINE_ENCODER]
    moved = np.abs(np.asarray(online["outer"] - start["outer"])).max()
    behind = np.abs(np.asarray(target["outer"] - start["outer"])).max()
    assert 0 < behind < moved  # the online encoder learns, the target follows slowly
    assert state.target_head is None  # memories are searched as they are encoded


def test_loading_predicts_and_steers(run: Path) -> None:
    predictor = load(run)
    question = np.eye(fakes.DIM, dtype=np.float32)[:3]
    steering = np.roll(question, 1, axis=1)
    np.testing.assert_array_equal(
        predictor.steer(question), predictor.steer(question, np.zeros_like(question))
    )
    assert np.abs(predictor.steer(question, steering) - predictor.steer(question)).max() > 1e-4
    np.testing.assert_allclose(
        predictor.steer(question[0], steering[0]), predictor.steer(question, steering)[0], atol=1e-5
    )
    with pytest.raises(PredictorError, match="no sessions"):
        predictor.session()
    with pytest.raises(PredictorError, match="steering has shape"):
        predictor.steer(question, steering[:2])


def test_evaluation_reports_every_variant(run: Path, steered_data: Path, tmp_path: Path) -> None:
    words = [
        "--encoder",
        "fakes:encoder",
        "--run",
        str(run),
        "--data",
        str(steered_data),
        "--split",
        "test",
        "--out",
    ]
    found = {}
    for variant in ("zero", "predicted", "centroid"):
        out = tmp_path / variant
        assert evaluate([*words, str(out), "--steering", variant]) == 0
        found[variant] = json.loads((out / "report.json").read_text())["methods"]["predicted"]["MRR@10"]
    assert found["centroid"] != found["zero"]
    told = {name: (tmp_path / name / "report.md").read_text() for name in found}
    assert "which is made from the right answer" in told["centroid"]
    assert "made from the question alone" in told["predicted"]
    assert "Nothing was steered" in told["zero"]
    assert evaluate([*words, str(tmp_path / "x"), "--steering", "best"]) == 2


def test_zero_steering_needs_no_folder_and_another_folder_is_noticed(
    run: Path, steered_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare, rebuilt = tmp_path / "bare", tmp_path / "rebuilt"
    shutil.copytree(steered_data, bare, ignore=shutil.ignore_patterns("steering"))
    words = [
        "--encoder",
        "fakes:encoder",
        "--run",
        str(run),
        "--split",
        "dev",
        "--out",
        str(tmp_path / "out"),
        "--data",
    ]
    assert evaluate([*words, str(bare), "--steering", "zero"]) == 0
    assert evaluate([*words, str(bare), "--steering", "predicted"]) == 2
    assert "there is no steering" in capsys.readouterr().err
    shutil.copytree(bare, rebuilt)
    again = ["--data", str(rebuilt), "--encoder", "fakes:encoder", "--clusters", f"{CLUSTERS}", "--seed", "9"]
    assert steering_builder.main([*again, "--tiers", "1", "1", "1", "1"]) == 0
    assert evaluate([*words, str(rebuilt), "--steering", "predicted"]) == 2
    assert "was built anew since" in capsys.readouterr().err


def test_one_question_on_two_lines_is_not_its_own_negative(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    dataset = fakes.write_conversations(tmp_path, chats=24)
    train_rows = dataset.splits["train"]
    twin = replace(train_rows[0], id="twin", positives=train_rows[9].positives, exclude=())
    write_dataset(tmp_path, replace(dataset, splits={**dataset.splits, "train": (twin, *train_rows)}))
    words = ["--data", str(tmp_path), "--encoder", "fakes:encoder", "--clusters", f"{CLUSTERS}"]
    assert steering_builder.main([*words, "--tiers", "1", "1", "1", "1"]) == 0
    config = settings(tmp_path, "jasper")
    ready = prepared(config)
    data, steering = ready.data, ready.steering
    assert steering is not None
    rights = steered_rows(config, data, steering).rights()
    same = {train_rows[0].positives[0], twin.positives[0]}
    assert {data.corpus_ids[row] for row in rights[0]} == same
    assert {data.corpus_ids[row] for row in rights[1]} == same
    batch = next(
        TrainingBatches(data, "train", batch_size=8, seed=0, steering=steered_rows(config, data, steering))
    )
    assert batch.positive_ids.shape[1] == 2


def test_explanations_are_complete_and_add_up(run: Path, steered_data: Path, tmp_path: Path) -> None:
    words = [
        "--encoder",
        "fakes:encoder",
        "--run",
        str(run),
        "--data",
        str(steered_data),
        "--out",
        str(tmp_path / "out"),
    ]
    assert explain([*words, "--split", "dev", "--count", "3"]) == 0
    page = (tmp_path / "out" / "explanations.html").read_text()
    told = json.loads((tmp_path / "out" / "explanations.json").read_text())
    assert len(told) == 3
    assert page.count("<article>") == 3
    assert "http" not in page  # works offline
    for each in told:
        assert sum(each["routing_distribution"].values()) == pytest.approx(1.0, abs=1e-5)
        assert each["confidence"] == max(each["routing_distribution"].values())
        whole = np.float32(each["coarse_vector"]) + np.float32(each["fine_vector"])
        np.testing.assert_array_equal(whole, np.float32(each["predicted_source_emb"]))
        assert each["atypicality"] == pytest.approx(np.linalg.norm(each["fine_vector"]), abs=1e-5)
        assert len(each["similar_known_pairs"]) == 3
        assert each["steering_influence"]["kl"] >= 0
        assert each["actionable_signal"].endswith(".")
    assert explain([*words, "--question", "topic1 turn2", "--steer", "topic3"]) == 0
    for contradiction in (
        ["--count", "0"],
        ["--question", "topic1 turn2", "--steering", "predicted"],
        ["--steer", "topic3", "--steering", "zero"],
        ["--question", " "],
    ):
        assert explain([*words, *contradiction]) == 2


def test_steering_influence_compares_with_none(run: Path, steered_data: Path) -> None:
    predictor = load(run)
    known = prepared(settings(steered_data)).steering
    assert known is not None
    explainer = Explainer(predictor.model, known.centroids, known.names)
    question = known.centroids[0]
    found = explainer.compare_steering_influence(question, {"there": known.centroids[1] - question})
    assert found["zero"].steering_influence.kl == 0.0
    assert found["zero"].steering_influence.l2 == 0.0
    there, zero = found["there"], found["zero"]
    expected = float(np.sum(there.routing * np.log(there.routing / zero.routing)))
    assert there.steering_influence.kl == pytest.approx(expected, abs=1e-5)  # KL(with || without)
    with pytest.raises(PredictorError, match="names"):
        Explainer(predictor.model, known.centroids, known.names[:1])
    with pytest.raises(PredictorError, match="chooses among 4 subspaces, but 3 are named"):
        Explainer(predictor.model, known.centroids[:3], known.names[:3])
    with pytest.raises(PredictorError, match="'zero'"):
        explainer.compare_steering_influence(question, {"zero": question})
    with pytest.raises(PredictorError, match="'short' has shape"):
        explainer.compare_steering_influence(question, {"short": question[:3]})
    assert explainer.explain_batch(np.zeros((0, fakes.DIM), np.float32)) == []


def test_a_plain_model_is_explained_from_the_command_line(steered_data: Path, tmp_path: Path) -> None:
    train(settings(steered_data, "jasper", "--train.num-epochs", "1"), tmp_path / "run")
    assert (tmp_path / "run" / "steering.png").is_file()
    words = [
        "--encoder",
        "fakes:encoder",
        "--run",
        str(tmp_path / "run"),
        "--data",
        str(steered_data),
        "--out",
        str(tmp_path / "out"),
    ]
    assert explain([*words, "--count", "2"]) == 0
    (first, _) = json.loads((tmp_path / "out" / "explanations.json").read_text())
    assert first["confidence"] is None
    assert first["actionable_signal"].startswith("The prediction lies nearest to")


def test_settings_without_effect_are_told(
    steered_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--jasper.routing", "5", "--train.num-epochs", "1", "--train.ema-start", "0.9"]
    train(settings(steered_data, "jasper", *more), tmp_path / "run")
    told = capsys.readouterr()
    assert "jasper.routing has no effect on a jasper model" in told.out + told.err
    assert "ema_start has no effect" not in told.out + told.err


def test_mismatches_are_named(steered_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_subspaces is 5.*4 clusters"):
        train(settings(steered_data, "subspace", "--model.num-subspaces", "5"), tmp_path / "a")
    with pytest.raises(DataError, match="there is no steering"):
        train(settings(steered_data, "jasper", "--steering.path", str(tmp_path / "none")), tmp_path / "b")


def test_weights_of_a_run_start_another_but_its_centroids_stay_those_of_the_data(
    run: Path, steered_data: Path, tmp_path: Path
) -> None:
    config = settings(steered_data, "subspace", "--model.checkpoint-path", str(run))
    state = loop._Run(config, tmp_path, prepared(config)).state
    known = prepared(config).steering
    assert known is not None
    np.testing.assert_array_equal(np.asarray(state.params[MODEL][CENTROIDS]), known.centroids)
    before = nnx.to_pure_dict(nnx.state(checkpoints.load_model(run).model, nnx.Param))
    gate = jnp.asarray(before["residual_gate"])
    np.testing.assert_array_equal(np.asarray(state.params[MODEL]["residual_gate"]), gate)
    assert replace(state, halted=state.halted).target_head is None

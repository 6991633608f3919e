"""Training a text predictor: however a batch is split, the step is the same; and whole runs."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_bert
from commands import exit_codes, figures, start_together
from steps import assert_same, unit_rows
from test_loop import interrupt_after
from tiny_text import sequences, text_config

import prime_jax
from prime_jax.config import MeshConfig
from prime_jax.data.sequences import PackedBatches
from prime_jax.evaluate.run import evaluate_run
from prime_jax.losses.corpus import corpus_info_nce, in_chunks
from prime_jax.losses.objective import Objective
from prime_jax.train import checkpoints
from prime_jax.train.__main__ import main
from prime_jax.train.adapters import layers_of
from prime_jax.train.blending import Blending
from prime_jax.train.sharding import make_mesh, split_batch, state_shardings
from prime_jax.train.state import TrainState, build_graph, init_state
from prime_jax.train.step import StepPlan, make_train_step
from prime_jax.types import Batch

CONFIG = Path(__file__).parents[2] / "configs" / "text.yaml"
ROWS, DIM = 16, 32
MODEL = text_config()
GIVEN = sequences(ROWS, seed=4)


def batch(pack: PackedBatches) -> Batch:
    """Rows with all right answers, given negatives, and their conversations."""
    rng = np.random.default_rng(0)
    return Batch(
        context=np.zeros((ROWS, 1, DIM), np.float32),
        context_mask=np.zeros((ROWS, 1), bool),
        query=unit_rows(rng, ROWS, DIM),
        target=unit_rows(rng, ROWS, DIM),
        target_id=np.arange(ROWS),
        positive_ids=np.stack([np.arange(ROWS), np.arange(ROWS) ^ 1], axis=1),
        example=np.arange(ROWS),
        negatives=unit_rows(rng, ROWS, 3, DIM),
        negative_ids=rng.integers(-1, 40, size=(ROWS, 3)),
        positives=unit_rows(rng, ROWS, 2, DIM),
        conversations=pack(np.arange(ROWS), 0, 1),
    )


def run(
    mesh: MeshConfig | None = None, *, micro_batch: int = 0, corpus: int = 0, lora: int = 0, **plan: Any
) -> tuple[TrainState, list[dict[str, float]]]:
    """Two steps of plain gradient descent; state and metrics."""
    optimizer, objective = optax.sgd(0.1), Objective(temperature=0.05)
    devices = make_mesh(mesh or MeshConfig(data=1), ROWS, micro_batch)
    begun = init_state(MODEL, optimizer, 0, averaging="average_weights" in plan, lora_rank=lora)
    state = jax.device_put(begun, state_shardings(devices, begun))
    pack = PackedBatches(GIVEN, 32, ROWS // micro_batch if micro_batch else 1, devices.size)
    passages = np.random.default_rng(9).normal(size=(41, DIM)).astype(np.float32)
    chunks = in_chunks(passages, corpus, devices) if corpus else None
    given = StepPlan(10, micro_batch=micro_batch, inputs_of=MODEL.inputs_of, layers_frozen=lora > 0, **plan)
    step = make_train_step(build_graph(MODEL, jnp.float32), optimizer, objective, given, devices)
    told = []
    for _ in range(2):
        state, metrics = step(state, split_batch(batch(pack), devices), chunks)
        told.append({name: float(value) for name, value in metrics.items()})
    return state, told


@pytest.fixture(scope="module")
def whole() -> tuple[TrainState, list[dict[str, float]]]:
    return run()


@pytest.mark.parametrize("micro_batch", [4, 8])
def test_micro_batches_equal_the_whole_batch(whole: Any, micro_batch: int) -> None:
    assert_same(whole, run(micro_batch=micro_batch), 2e-5)


@pytest.mark.parametrize("remat", ["dots", "blocks"])
def test_what_is_recomputed_is_the_same(whole: Any, remat: Any) -> None:
    assert_same(whole, run(remat=remat), 2e-5)


@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(data=2, fsdp=2)], ids=str)
def test_devices_equal_one(mesh: MeshConfig) -> None:
    """Weights in shares, micro-batches, passages in chunks and averaged weights, all at once."""
    settings: dict[str, Any] = {"micro_batch": 8, "corpus": 7, "average_weights": 0.9}
    assert_same(run(**settings), run(mesh, **settings), 2e-5)


def test_chunks_of_passages_equal_all_at_once() -> None:
    assert_same(run(corpus=41), run(corpus=7), 2e-5)
    predicted = jnp.asarray(unit_rows(np.random.default_rng(3), ROWS, DIM))
    given: Batch = jax.tree.map(jnp.asarray, batch(PackedBatches(GIVEN, 32)))
    passages = np.random.default_rng(9).normal(size=(41, DIM)).astype(np.float32)
    found = corpus_info_nce(predicted, given, in_chunks(passages, 7), temperature=0.05).loss
    logits = predicted @ (passages / np.linalg.norm(passages, axis=1, keepdims=True)).T / 0.05
    wrong = np.array(logits)
    np.put_along_axis(wrong, np.asarray(given.positive_ids), -np.inf, axis=1)
    wrong = jax.nn.logsumexp(wrong, axis=1)[:, None]
    right = jnp.einsum("be,bpe->bp", predicted, given.positives) / 0.05
    np.testing.assert_allclose(found, jnp.mean(jnp.logaddexp(right, wrong) - right, axis=1), rtol=1e-5)


def test_adapters_leave_the_layers_as_they_are(whole: Any) -> None:
    state, told = run(lora=2)
    fresh = init_state(MODEL, optax.sgd(0.1), 0)
    for left, right in zip(
        jax.tree.leaves(layers_of(state.params["model"])),
        jax.tree.leaves(layers_of(fresh.params["model"])),
        strict=True,
    ):
        np.testing.assert_array_equal(left, right)
    assert np.abs(np.asarray(state.params["adapters"][0]["mlp_in"]["kernel"]["b"])).max() > 0
    assert told[0]["loss"] == pytest.approx(whole[1][0]["loss"], rel=1e-5)
    assert told[1]["loss"] < told[0]["loss"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert.write_folder(tmp_path_factory.mktemp("bert") / "tiny", tiny_bert.tensors())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert.write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def options(folder: Path, data: Path) -> list[str]:
    """The shipped configuration, only smaller."""
    return [
        *("--config", str(CONFIG), "--model.input-dim", "32", "--model.output-dim", "32"),
        *("--model.max-tokens", "32", "--train.batch-size", "8", "--train.num-epochs", "2"),
        *("--train.learning-rate", "0.01", "--data.encoder", str(folder), "--data.path", str(data)),
        *("--mesh.data", "1", "--monitor.log-every", "1"),
    ]


@pytest.fixture(scope="module")
def trained(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main([*options, "--out", str(out)]) == 0
    return out


def test_from_raw_text_to_a_report(trained: Path, data: Path, tmp_path: Path) -> None:
    best = checkpoints.best(trained)
    assert (best.folder / "tokenizer.json").is_file()
    assert best.score > 0.2
    report = evaluate_run(trained, data, "dev", tmp_path / "report")
    assert report["methods"]["predicted"]["MRR@10"] == pytest.approx(best.score, abs=1e-6)
    assert report["confidence"] is not None  # a confidence came with it


def test_texts_in_vectors_out(trained: Path) -> None:
    predictor = prime_jax.load(trained)
    contexts, queries = [["the cat sat", "rain fell"], []], ["dogs ran home", "a mat"]
    both = predictor.predict_text(contexts, queries)
    assert both.shape == (2, 32)
    for row in range(2):
        one = predictor.predict_text(contexts[row], queries[row])
        np.testing.assert_allclose(one, both[row], atol=2e-6)
    assert predictor.predict_text([], []).shape == (0, 32)
    assert predictor.info()["model"]["kind"] == "text"


def test_what_reads_text_takes_no_embeddings(trained: Path) -> None:
    predictor = prime_jax.load(trained)
    with pytest.raises(prime_jax.PredictorError, match="a text model reads texts, no embeddings: call"):
        predictor.predict(np.ones((1, 32), np.float32), np.ones(32, np.float32))
    for refused in (predictor.session, predictor.batcher):
        with pytest.raises(prime_jax.PredictorError, match="reads texts, no embeddings"):
            refused()
    with pytest.raises(prime_jax.ConfigError, match="reads texts itself; leave encoder out"):
        predictor.predict_text([], "a mat", encoder="minilm")
    with pytest.raises(prime_jax.PredictorError, match="not a list of texts"):
        predictor.predict_text("the cat", "a mat")


def test_resuming_gives_the_same_weights(
    options: list[str], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second epoch; the same to the bit."""
    with monkeypatch.context() as patch:
        interrupt_after(7, patch)
        assert main([*options, "--out", str(tmp_path)]) == 130
    assert main(["--resume", "--out", str(tmp_path)]) == 0
    left, right = (checkpoints.latest(run) for run in (trained, tmp_path))
    assert left is not None
    assert right is not None
    assert left.step == right.step == 12
    params = [jax.tree.leaves(checkpoints.load_model(one.folder).model) for one in (left, right)]
    for one, other in zip(*params, strict=True):
        np.testing.assert_array_equal(one, other)


EVERYTHING = [
    *("--train.negatives", "batch", "--train.mined-negatives", "2", "--train.context-negatives", "true"),
    *("--train.micro-batch-size", "4", "--train.average-weights", "0.9", "--train.num-epochs", "1"),
    *("--data.context-from", "search", "--data.first-pass-k", "3", "--train.temperature-schedule", "learned"),
    *("--train.blend-with-start", "true"),
]


def test_nothing_is_refused_and_two_processes_learn_what_one_learns(
    options: list[str], data: Path, tmp_path: Path
) -> None:
    """A first search as context, mined and context negatives, micro-batches, averages; weights in shares."""
    assert main([*options, *EVERYTHING, "--out", str(tmp_path / "one")]) == 0
    both = [*options, *EVERYTHING, "--mesh.data", "-1", "--mesh.fsdp", "2"]
    assert exit_codes(start_together(2, both, tmp_path / "two")) == [0, 0]
    names = ("loss", "gradient_norm", "negatives", "MRR@10")
    one, two = (figures(tmp_path / run, *names) for run in ("one", "two"))
    for name in names:
        np.testing.assert_allclose(two[name], one[name], rtol=2e-4, err_msg=name)
    best = checkpoints.best(tmp_path / "one")
    report = evaluate_run(tmp_path / "one", data, "dev", tmp_path / "report")
    assert report["methods"]["predicted"]["MRR@10"] == pytest.approx(best.score, abs=1e-6)


def test_a_blend_lies_between_the_start_and_what_was_trained(
    whole: tuple[TrainState, list[dict[str, float]]],
) -> None:
    trained, _ = whole
    begun = init_state(MODEL, optax.sgd(0.1), 0)
    blending = Blending(begun)
    for share in (0.0, 0.75, 1.0):
        at = blending.at(trained, share)
        for blend, before, now in zip(
            *(jax.tree.leaves(state.predicting) for state in (at, begun, trained)), strict=True
        ):
            expected = (1 - share) * np.asarray(before) + share * np.asarray(now)
            np.testing.assert_allclose(blend, expected, atol=1e-7 if 0 < share < 1 else 0)

    def near_a_half(state: TrainState) -> float:
        wanted = jax.tree.leaves(blending.at(trained, 0.5).predicting)
        apart = zip(jax.tree.leaves(state.predicting), wanted, strict=True)
        return -sum(float(jnp.abs(one - other).sum()) for one, other in apart)

    assert blending.best(trained, near_a_half)[1] == 0.5
    assert blending.best(trained, lambda state: 0.0)[1] == 1  # of equal ones the trained one


def test_training_that_does_harm_ends_where_it_started(
    options: list[str], trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = checkpoints.best(trained)
    harmful = [*options, "--train.learning-rate", "100", "--train.num-epochs", "1"]
    harmful += ["--model.checkpoint-path", str(start.folder)]
    assert main([*harmful, "--out", str(tmp_path / "plain")]) == 0
    assert checkpoints.best(tmp_path / "plain").score < start.score
    capsys.readouterr()
    assert main([*harmful, "--train.blend-with-start", "true", "--out", str(tmp_path / "blended")]) == 0
    assert "at 0 of the way from the start" in " ".join(capsys.readouterr().err.split())
    assert checkpoints.best(tmp_path / "blended").facts["blend_share"] == 0
    assert checkpoints.best(tmp_path / "blended").score == pytest.approx(start.score, abs=1e-6)
    report = evaluate_run(tmp_path / "blended", data, "dev", tmp_path / "report")
    assert report["methods"]["predicted"]["MRR@10"] == pytest.approx(start.score, abs=1e-6)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--train.x-encoder", "trained"], "train.x_encoder is 'trained', but a text model needs 'frozen'"),
        (["--train.y-encoder", "slow"], "positives 'all' needs embeddings of passages that stay"),
        (["--train.rotation", "0.5"], "train.rotation is 0.5, but a text model needs 0.0"),
        (["--hybrid.enabled", "true"], "hybrid.enabled is True, but a text model needs False"),
        (["--data.encoder", "fakes:encoder"], "cannot be trained here"),
        (["--model.max-tokens", "65"], "more than the 64 that the encoder reads"),
        (["--model.input-dim", "16", "--model.output-dim", "16"], "the encoder is 32 wide"),
    ],
)
def test_what_does_not_go_together_is_said(
    options: list[str], tmp_path: Path, more: list[str], message: str, capsys: Any
) -> None:
    assert main([*options, *more, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1

"""Encoders trained along with the predictor: what a step does to them, and a run from text to a report."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_bert
from commands import exit_codes, figures, start_together
from test_loop import interrupt_after

import prime_jax
from prime_jax.config import TrainingConfig, read_config
from prime_jax.data.encode import load_encoder
from prime_jax.data.encode import main as encode
from prime_jax.data.store import EmbeddingStore
from prime_jax.data.tokens import TokenTable
from prime_jax.evaluate.run import evaluate_run
from prime_jax.export.__main__ import main as export
from prime_jax.export.verification import verify
from prime_jax.pretrained.bert import BertTextEncoder
from prime_jax.pretrained.pair import PASSAGE, PairedEncoder, load_pair, write_pair
from prime_jax.pretrained.writing import write_encoder
from prime_jax.train import checkpoints
from prime_jax.train.__main__ import main
from prime_jax.train.encoders import EncoderPlan, X, Y, encoder_plan, initial_encoders
from prime_jax.types import Batch, BatchTexts

CONFIG = Path(__file__).parents[2] / "configs" / "text_small.yaml"
TEXTS = ["the cat sat on a mat", "rain fell", "quiet dogs ran home", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert.write_folder(tmp_path_factory.mktemp("bert") / "tiny", tiny_bert.tensors())


@pytest.fixture(scope="module")
def encoder(folder: Path) -> BertTextEncoder:
    return BertTextEncoder(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert.write_texts(tmp_path_factory.mktemp("texts"))


def other_weights(encoder: BertTextEncoder) -> BertTextEncoder:
    return encoder.with_params(jax.tree.map(lambda leaf: leaf * 1.1 + 0.01, encoder.params), "other")


class TestAPairOnDisk:
    def test_an_encoder_reads_back_as_it_was(self, encoder: BertTextEncoder, tmp_path: Path) -> None:
        changed = other_weights(encoder)
        write_encoder(changed, tmp_path / "written")
        again = BertTextEncoder(tmp_path / "written")
        np.testing.assert_array_equal(again.encode(TEXTS), changed.encode(TEXTS))
        assert (again.max_length, again.pooling) == (changed.max_length, changed.pooling)
        assert not np.allclose(changed.encode(TEXTS), encoder.encode(TEXTS), atol=1e-3)

    def test_passages_go_to_y_and_all_else_to_x(self, encoder: BertTextEncoder, tmp_path: Path) -> None:
        x, y = encoder, other_weights(encoder)
        write_pair(PairedEncoder(x, y), tmp_path)
        for pair in (PairedEncoder(x, y), load_pair(tmp_path), load_encoder(str(tmp_path))):
            mixed = [TEXTS[0], PASSAGE + TEXTS[0], PASSAGE + TEXTS[1], TEXTS[2]]
            expected = [x.encode([TEXTS[0]]), *y.encode(TEXTS[:2])[:, None], x.encode([TEXTS[2]])]
            np.testing.assert_allclose(pair.encode(mixed), np.concatenate(expected), atol=1e-6)


def test_tokens_of_any_rows(encoder: BertTextEncoder, tmp_path: Path) -> None:
    store = EmbeddingStore.open(tmp_path, encoder.identity, encoder.dim)
    store.add(TEXTS, encoder.encode(TEXTS))
    table = TokenTable(store, TEXTS[::-1], encoder.tokenize)
    rows = np.array([[1, -1], [0, 2]])
    assert table.width(rows) == 16
    found = table.padded(rows, 16)
    np.testing.assert_array_equal(found.lengths, [[4, 0], [8, 6]])
    np.testing.assert_array_equal(found.tokens[1, 0, :8], tiny_bert.token_ids(TEXTS[0]))
    assert not found.tokens[0, 1].any()
    assert not found.tokens[0, 0, 4:].any()


def text_batch(encoder: BertTextEncoder, tmp_path: Path) -> Batch:
    store = EmbeddingStore.open(tmp_path, encoder.identity, encoder.dim)
    store.add(TEXTS, encoder.encode(TEXTS))
    table = TokenTable(store, TEXTS, encoder.tokenize)
    asked, passage = np.array([[0, 1], [-1, 2]]), np.array([2, 0])
    texts = jax.tree.map(jnp.asarray, BatchTexts(table.padded(asked, 16), table.padded(passage, 16)))
    dim = encoder.dim
    nothing = jnp.zeros((2, 1, dim)), jnp.array([[True], [False]]), jnp.zeros((2, dim)), jnp.zeros((2, dim))
    return Batch(*nothing, jnp.arange(2), jnp.arange(2)[:, None], jnp.arange(2), texts=texts)


def embed(plan: EncoderPlan, params: Any, batch: Batch) -> Batch:
    """A batch as a step sees it."""
    context, query, _ = plan.read(params, plan.inputs_of(batch))
    return plan.with_targets(params, batch)._replace(context=context, query=query)


@pytest.mark.parametrize("remat", [False, True])
def test_a_step_embeds_as_the_encoder_does(encoder: BertTextEncoder, tmp_path: Path, remat: bool) -> None:
    settings = TrainingConfig(
        x_encoder="trained", y_encoder="slow", mixed_precision=False, gradient_checkpointing=remat
    )
    plan, params = encoder_plan(encoder, settings), initial_encoders(encoder, settings)
    seen = embed(plan, params, text_batch(encoder, tmp_path))
    expected = encoder.encode(TEXTS)
    np.testing.assert_allclose(seen.context[0, 0], expected[0], atol=1e-5)
    np.testing.assert_allclose(seen.query, expected[[1, 2]], atol=1e-5)
    np.testing.assert_allclose(seen.target, expected[[2, 0]], atol=1e-5)


@pytest.mark.parametrize("y", ["frozen", "slow", "ema"])
def test_who_gets_a_gradient(encoder: BertTextEncoder, tmp_path: Path, y: str) -> None:
    settings = TrainingConfig(x_encoder="trained", y_encoder=y, mixed_precision=False)
    plan, params = encoder_plan(encoder, settings), initial_encoders(encoder, settings)
    batch = text_batch(encoder, tmp_path)

    def loss(params: Any) -> jax.Array:
        seen = embed(plan, params, batch)
        return jnp.sum(seen.query * jnp.roll(seen.target, 1, axis=0)) + jnp.sum(seen.query[:, 0])

    gradient = jax.grad(loss)(params)
    assert gradient.keys() == {X} | ({Y} if y != "frozen" else set())
    assert np.abs(gradient[X]["layers"][0]["qkv"]["kernel"]).max() > 1e-6
    if Y in gradient:
        assert (np.abs(gradient[Y]["layers"][0]["qkv"]["kernel"]).max() > 1e-6) == (y == "slow")


def test_layers_are_unfrozen_from_the_top(encoder: BertTextEncoder) -> None:
    """Two layers in 4 epochs: the upper one from the start, the lower from epoch 2, the embeddings from 4."""
    settings = TrainingConfig(x_encoder="trained", unfreeze_epochs=4.0)
    plan, params = encoder_plan(encoder, settings), initial_encoders(encoder, settings)
    ones = {X: jax.tree.map(jnp.ones_like, params[X]), "model": jnp.ones(2)}
    for epoch, upper, lower, words in ((0, 1, 0, 0), (1.9, 1, 0, 0), (2, 1, 1, 0), (4, 1, 1, 1)):
        found = plan.gated(ones, jnp.float32(epoch))
        moved = [found[X]["layers"][1], found[X]["layers"][0], found[X]["words"]]
        assert [float(jax.tree.leaves(part)[0].max()) for part in moved] == [upper, lower, words]
        assert found["model"].tolist() == [1, 1]


def test_y_follows_x_as_its_average(encoder: BertTextEncoder) -> None:
    settings = TrainingConfig(x_encoder="trained", y_encoder="ema", ema_start=0.75, ema_end=0.75)
    plan = encoder_plan(encoder, settings)
    moved = plan.averaged({X: {"w": jnp.array([8.0])}, Y: {"w": jnp.array([4.0])}}, jnp.float32(0.5))
    assert (moved[X]["w"].tolist(), moved[Y]["w"].tolist()) == ([8.0], [5.0])


@pytest.fixture(scope="module")
def options(folder: Path, data: Path) -> list[str]:
    """The shipped configuration, only smaller."""
    sizes = ["--model.input-dim", "32", "--model.output-dim", "32", "--model.hidden-dim", "128"]
    sizes += ["--model.num-layers", "1", "--model.num-heads", "4", "--train.batch-size", "8"]
    sizes += ["--train.num-epochs", "2", "--mesh.data", "1", "--data.encoder", str(folder)]
    sizes += ["--train.gradient-checkpointing", "false", "--model.use-torch-compile", "false"]
    return ["--config", str(CONFIG), *sizes, "--data.path", str(data)]


@pytest.fixture(scope="module")
def run(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main([*options, "--out", str(out)]) == 0
    return out


def test_from_raw_text_to_a_report(run: Path, data: Path, folder: Path, tmp_path: Path) -> None:
    best = checkpoints.best(run)
    pair = load_pair(best.folder / "encoder")
    assert best.facts["encoder"] == pair.identity
    start = BertTextEncoder(folder)
    assert best.facts["encoder_start"] == start.identity
    moved = [np.abs(now.encode(TEXTS) - start.encode(TEXTS)).max() for now in (pair.x, pair.y)]
    assert moved[0] > moved[1] > 1e-7  # Y is the slower

    # What training measured is what the evaluation measures with the encoders as they were written.
    report = evaluate_run(run, data, "dev", tmp_path / "report")
    assert report["methods"]["predicted"]["MRR@10"] == pytest.approx(best.score, abs=1e-3)

    # The memory, encoded anew by the command with the trained Y-encoder.
    store_root = tmp_path / "stores"
    words = ["--data", str(data), "--encoder", str(best.folder / "encoder"), "--store", str(store_root)]
    assert encode(words) == 0
    store = EmbeddingStore.open(store_root, pair.identity, pair.dim)
    passage = "a cat over the hills"
    np.testing.assert_allclose(store[store.rows([PASSAGE + passage])], pair.y.encode([passage]), atol=1e-6)
    assert prime_jax.load(run, precision="float32").info()["encoder"] == pair.identity


def test_the_bundle_carries_the_encoders(run: Path, tmp_path: Path) -> None:
    """Text in, vector out: from the run, from the bundle, and from one ONNX file and a tokenizer."""
    import onnxruntime
    from tokenizers import Tokenizer

    bundle = tmp_path / "bundle"
    assert export(["--run", str(run), "--out", str(bundle)]) == 0
    context, query = ["the cat sat", "rain fell over the hills"], "dogs ran home"
    expected = prime_jax.load(run, precision="float32").predict_text(context, query)
    found = prime_jax.load(bundle, precision="float32").predict_text(context, query)
    np.testing.assert_allclose(found, expected, atol=1e-5)

    assert "embed the memory anew" in (bundle / "MODEL_CARD.md").read_text()
    tokenizer = Tokenizer.from_file(str(bundle / "encoder" / "x" / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids, mask = np.zeros((1, 4, 12), np.int32), np.zeros((1, 4, 12), np.int32)
    for slot, text in ((0, context[0]), (1, context[1]), (3, query)):  # three turns at most, then the query
        row = tokenizer.encode(text).ids
        ids[0, slot, : len(row)], mask[0, slot, : len(row)] = row, 1
    session = onnxruntime.InferenceSession(str(bundle / "text.onnx"))
    (answer,) = session.run(["embedding"], {"input_ids": ids, "attention_mask": mask})
    np.testing.assert_allclose(answer[0], expected, atol=1e-5)

    memory = onnxruntime.InferenceSession(str(bundle / "encoder" / "y" / "model.onnx"))
    (passage,) = memory.run(None, {"input_ids": ids[:, 0], "attention_mask": mask[:, 0]})
    np.testing.assert_allclose(passage[0], load_pair(bundle / "encoder").y.encode(context[:1])[0], atol=1e-5)
    assert any(line.startswith("text.onnx: golden texts") for line in verify(bundle, onnx=True))


def test_resuming_gives_the_same_encoders(
    options: list[str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second epoch; both encoders end up the same to the bit."""
    with monkeypatch.context() as patch:
        interrupt_after(7, patch)
        assert main([*options, "--out", str(tmp_path)]) == 130
    assert main(["--resume", "--out", str(tmp_path)]) == 0
    newest = [checkpoints.latest(folder) for folder in (run, tmp_path)]
    assert newest[0].step == newest[1].step == 12
    assert newest[0].facts["encoder"] == newest[1].facts["encoder"]  # a hash of their weights


EVERYTHING = [
    *("--train.y-encoder", "frozen", "--train.positives", "all", "--train.mined-negatives", "2"),
    *("--train.context-negatives", "true", "--train.average-weights", "0.9", "--train.unfreeze-epochs", "0"),
    *("--model.dropout", "0", "--monitor.log-every", "1", "--train.num-epochs", "1"),
]


def test_with_a_frozen_memory_nothing_is_refused(options: list[str], data: Path, tmp_path: Path) -> None:
    """In two processes with micro-batches what one learns without; then all passages as negatives."""
    assert main([*options, *EVERYTHING, "--out", str(tmp_path / "one")]) == 0
    split = [*options, *EVERYTHING, "--train.micro-batch-size", "4", "--mesh.data", "-1"]
    assert exit_codes(start_together(2, split, tmp_path / "two")) == [0, 0]
    names = ("loss", "gradient_norm", "negatives", "MRR@10")
    one, two = (figures(tmp_path / run, *names) for run in ("one", "two"))
    for name in names:
        np.testing.assert_allclose(two[name], one[name], rtol=2e-4, err_msg=name)
    best = checkpoints.best(tmp_path / "one")
    report = evaluate_run(tmp_path / "one", data, "dev", tmp_path / "report")
    assert report["methods"]["predicted"]["MRR@10"] == pytest.approx(best.score, abs=1e-3)
    all_passages = [*options, "--train.y-encoder", "frozen", "--train.negatives", "corpus"]
    assert main([*all_passages, "--train.num-epochs", "1", "--out", str(tmp_path / "corpus")]) == 0
    assert set(figures(tmp_path / "corpus", "negatives")["negatives"]) == {len(tiny_bert.WORDS) - 1}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--train.micro-batch-size", "4"], "micro_batch_size 4 needs embeddings of passages that stay"),
        (["--train.mined-negatives", "2"], "mined_negatives 2 needs embeddings of passages that stay"),
        (["--train.x-encoder", "frozen"], "x_encoder must be 'trained'"),
        (["--data.context-from", "search"], "an encoder that moves would have to find and encode anew"),
        (
            ["--data.encoder", "fakes:encoder", "--model.input-dim", "24", "--model.output-dim", "24"],
            "cannot be trained",
        ),
    ],
)
def test_what_does_not_go_together_is_said(
    options: list[str], tmp_path: Path, more: list[str], message: str, capsys: Any
) -> None:
    assert main([*options, *more, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_the_shipped_configuration_is_for_minilm() -> None:
    config = read_config(CONFIG)
    assert (config.data.encoder, config.model.input_dim, config.train.y_encoder) == ("minilm", 384, "ema")

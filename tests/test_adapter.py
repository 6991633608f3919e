"""What a text predictor adds to its encoder, as a file: written, read, exported, and refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bert
from flax import nnx
from safetensors.numpy import load_file, save_file

import prime_jax
from prime_jax.errors import CheckpointError, ConfigError, ExportError
from prime_jax.export.__main__ import main as export
from prime_jax.export.adapter import _leaves, write_adapter
from prime_jax.models.adapter import FORMAT, read_facts
from prime_jax.predict.adapter import load_adapter
from prime_jax.pretrained.bert import BertTextEncoder
from prime_jax.train.__main__ import main as train

CONFIGS = Path(__file__).parents[1] / "configs"
TALKS, QUERIES = [["the cat sat", "rain fell"], []], ["dogs ran home", "a mat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert.write_folder(tmp_path_factory.mktemp("encoder") / "tiny", tiny_bert.tensors())


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the shipped configuration, only smaller."""
    root = tmp_path_factory.mktemp("adapted")
    data = tiny_bert.write_texts(root / "data")
    assert train([*settings(folder, data), "--out", str(root / "run")]) == 0
    return root / "run"


def settings(folder: Path, data: Path) -> list[str]:
    return [
        *("--config", str(CONFIGS / "general.yaml"), "--model.input-dim", "32", "--model.output-dim", "32"),
        *("--model.max-tokens", "32", "--train.batch-size", "8", "--train.learning-rate", "0.05"),
        *("--train.lora-rank", "3", "--data.encoder", str(folder), "--data.path", str(data)),
        *("--mesh.data", "1", "--train.blend-with-start", "false"),
    ]


@pytest.fixture(scope="module")
def file(run: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("files")
    told = ["--run", str(run), "--out", str(out / "bundle"), "--adapter", str(out / "small.safetensors")]
    assert export([*told, "--licence", "CC BY-SA 4.0", "--attribution", "hills by nobody"]) == 0
    return out / "small.safetensors"


def test_encoder_and_adapter_are_the_run(run: Path, file: Path, folder: Path) -> None:
    expected = prime_jax.load(run).predict_text(TALKS, QUERIES)
    predictor = prime_jax.load_adapter(file, str(folder))
    np.testing.assert_allclose(predictor.predict_text(TALKS, QUERIES), expected, atol=1e-5)
    before = prime_jax.untrained(encoder=str(folder), weight=0.0).predict_text(TALKS, QUERIES)
    assert np.abs(expected - before).max() > 0.01
    assert predictor.info()["licence"] == "CC BY-SA 4.0"
    assert file.stat().st_size < 30_000  # the encoder has 110,000 bytes
    names = {name.rsplit("/", 1)[0] for name in load_file(file)}
    assert all(name == "roles" or "/layers/" in name for name in names)


def test_a_share_of_it_lies_between_encoder_and_run(file: Path, folder: Path, tmp_path: Path) -> None:
    encoder = BertTextEncoder(folder)
    whole = load_adapter(file, encoder)
    half, start = load_adapter(file, encoder, share=0.5), load_adapter(file, encoder, share=1e-6)
    leaves = [
        dict(_leaves(nnx.to_pure_dict(nnx.state(one.model, nnx.Param)))) for one in (start, half, whole)
    ]
    name = next(name for name in leaves[0] if np.abs(leaves[2][name] - leaves[0][name]).max() > 0.01)
    np.testing.assert_allclose(leaves[1][name], (leaves[0][name] + leaves[2][name]) / 2, atol=1e-5)
    told = {"format": FORMAT, **read_facts(file), "share": 0.5}
    shared = tmp_path / "shared.safetensors"
    save_file(load_file(file), shared, metadata={"prime_jax": json.dumps(told)})
    expected = half.predict_text(TALKS, QUERIES)
    np.testing.assert_allclose(
        load_adapter(shared, encoder).predict_text(TALKS, QUERIES), expected, atol=1e-6
    )
    full = load_adapter(shared, encoder, share=1.0)
    np.testing.assert_allclose(
        full.predict_text(TALKS, QUERIES), whole.predict_text(TALKS, QUERIES), atol=1e-6
    )
    assert full.info()["share"] == 1.0
    assert "metrics" not in full.info()
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="share must be above 0 and at most 1"):
            load_adapter(file, encoder, share=wrong)


def test_it_is_exported_like_any_other(run: Path, file: Path, folder: Path, tmp_path: Path) -> None:
    told = ["--from-adapter", str(file), "--encoder", str(folder), "--out", str(tmp_path / "bundle")]
    assert export(told) == 0
    assert "Weights: CC BY-SA 4.0; hills by nobody." in (tmp_path / "bundle" / "MODEL_CARD.md").read_text()
    np.testing.assert_allclose(
        prime_jax.load(tmp_path / "bundle").predict_text(TALKS, QUERIES),
        prime_jax.load(run).predict_text(TALKS, QUERIES),
        atol=1e-5,
    )


def test_training_goes_on_from_an_adapter(run: Path, file: Path, folder: Path, tmp_path: Path) -> None:
    data = tiny_bert.write_texts(tmp_path / "data")
    start = ["--train.start", str(file)]
    still = ["--train.learning-rate", "1e-30", "--out", str(tmp_path / "still")]
    assert train([*settings(folder, data), *start, *still]) == 0
    expected = prime_jax.load(run).predict_text(TALKS, QUERIES)
    np.testing.assert_allclose(
        prime_jax.load(tmp_path / "still").predict_text(TALKS, QUERIES), expected, atol=1e-5
    )
    assert train([*settings(folder, data), *start, "--out", str(tmp_path / "run")]) == 0
    moved = prime_jax.load(tmp_path / "run").predict_text(TALKS, QUERIES)
    assert np.abs(moved - expected).max() > 0.01
    out = ["--out", str(tmp_path / "bundle"), "--adapter", str(tmp_path / "both.safetensors")]
    assert export(["--run", str(tmp_path / "run"), *out]) == 0
    facts = read_facts(tmp_path / "both.safetensors")
    assert (facts["licence"], facts["attribution"]) == ("CC BY-SA 4.0", "hills by nobody")
    card = (tmp_path / "bundle" / "MODEL_CARD.md").read_text()
    assert "Weights: CC BY-SA 4.0; hills by nobody." in card
    both = load_adapter(tmp_path / "both.safetensors", str(folder))
    np.testing.assert_allclose(both.predict_text(TALKS, QUERIES), moved, atol=1e-5)


@pytest.mark.usefixtures("as_users_run_it")
def test_a_start_that_does_not_fit_is_refused(
    file: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny_bert.write_texts(tmp_path / "data")
    other = tiny_bert.write_folder(tmp_path / "other", tiny_bert.tensors(seed=1))

    def refused(message: str, encoder: Path, *more: str) -> None:
        assert train([*settings(encoder, data), "--out", str(tmp_path / "run"), *more]) == 2
        assert message in capsys.readouterr().err

    changed = tmp_path / "changed.safetensors"
    shutil.copyfile(file, changed)
    begun = ["--train.start", str(changed), "--out", str(tmp_path / "begun")]
    assert train([*settings(folder, data), *begun]) == 0
    tensors = {name: value * 2 for name, value in load_file(changed).items()}
    save_file(tensors, changed, metadata={"prime_jax": json.dumps({"format": FORMAT, **read_facts(file)})})
    assert train([*settings(folder, data), *begun, "--resume"]) == 2
    assert "was trained with start" in capsys.readouterr().err
    refused("belongs to the encoder", other, "--train.start", str(file))
    refused("neither encoder nor general, nor the file", folder, "--train.start", "genral")
    refused("roles has no place in this model", folder, "--train.start", str(file), "--model.roles", "false")
    refused(
        "which goes with a text predictor that starts as its encoder",
        *(folder, "--train.start", str(file), "--model.checkpoint-path", str(tmp_path)),
    )


def test_where_the_start_reads_otherwise_is_said(
    file: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tiny_bert.write_texts(tmp_path / "data"), tmp_path / "run"
    start = ["--train.start", str(file), "--out", str(out)]
    assert train([*settings(folder, data), *start, "--model.query-weight", "0"]) == 0
    said = capsys.readouterr()
    assert "was trained with model.query_weight 0.5, here it is 0.0" in said.out + said.err
    joined = ["--model.separate-turns", "false", "--model.roles", "false", "--model.query-weight", "0"]
    assert train([*settings(folder, data), *start, *joined, "--out", str(tmp_path / "other")]) == 2
    assert "was trained with model.separate_turns True; set it so" in capsys.readouterr().err


def test_what_is_no_low_rank_update_is_not_written(run: Path, folder: Path, tmp_path: Path) -> None:
    model: Any = prime_jax.load(run).model
    encoder, out = BertTextEncoder(folder), tmp_path / "x.safetensors"
    with pytest.raises(ExportError, match=r"rank 1 leaves .* take that of train\.lora_rank"):
        write_adapter(model, encoder, out, rank=1, facts={})
    untouched: Any = prime_jax.untrained(encoder=encoder).model
    with pytest.raises(ExportError, match="nothing to write"):
        write_adapter(untouched, encoder, out, rank=3, facts={})
    untouched.encoder.words.embedding.set_value(untouched.encoder.words.embedding[...] + 1)
    with pytest.raises(ExportError, match="words/embedding was trained"):
        write_adapter(untouched, encoder, out, rank=3, facts={})
    assert not out.exists()


@pytest.mark.usefixtures("as_users_run_it")
def test_files_that_do_not_fit_are_refused(file: Path, folder: Path, tmp_path: Path) -> None:
    encoder, broken = BertTextEncoder(folder), tmp_path / "broken.safetensors"
    told, tensors = {"format": FORMAT, **read_facts(file)}, load_file(file)
    other = tiny_bert.write_folder(tmp_path / "other", tiny_bert.tensors(seed=1))
    with pytest.raises(CheckpointError, match="belongs to the encoder"):
        load_adapter(file, str(other))
    with pytest.raises(CheckpointError, match="the file is missing"):
        load_adapter(tmp_path / "nowhere.safetensors", encoder)
    with pytest.raises(ConfigError):
        load_adapter(file, "nowhere")

    def refused(message: str, facts: dict[str, Any] = told, **changed: Any) -> None:
        save_file({**tensors, **changed}, broken, metadata={"prime_jax": json.dumps(facts)})
        with pytest.raises(CheckpointError, match=message):
            load_adapter(broken, encoder)

    name = next(name for name in tensors if name.endswith("/a"))
    refused("not an adapter of the format", {**told, "format": "prime-jax adapter 9"})
    refused("does not describe a model", {**told, "model": {"kind": "text", "max_tokens": 3}})
    refused("does not describe a model", {**told, "model": None})
    refused("not the encoder that it belongs to", {**told, "encoder": 5})
    refused("its share is 2.0", {**told, "share": 2.0})
    refused("its query_prefix is 5", {**told, "query_prefix": 5})
    refused("its metrics are", {**told, "metrics": {"MRR@10": "high"}})
    refused("finite float32", **{name: np.full_like(tensors[name], np.nan)})
    refused("not float32 that fits together", **{name: tensors[name][:, :1]})
    refused("not float32 that fits together", **{name: tensors[name].astype(np.float16)})
    refused("must be finite float32 of shape", **{name: tensors[name][:5]})
    refused("has no place in this model", more=np.zeros(3, np.float32))
    save_file({}, broken, metadata={"prime_jax": json.dumps(told)})
    with pytest.raises(CheckpointError, match="holds no updates"):
        load_adapter(broken, encoder)
    save_file(tensors, broken, metadata={"prime_jax": json.dumps({**told, "source": str(other)})})
    assert load_adapter(str(broken), encoder).info()["source"] == str(folder)
    broken.write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="not an adapter"):
        load_adapter(broken, encoder)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (["--untrained", "6", "--adapter", "x.safetensors"], "goes with --run"),
        (["--run", "{run}", "--adapter", "x.bin"], "goes with --run"),
        (["--run", "{run}", "--attribution", "somebody"], "goes with --adapter"),
        (["--run", "{run}", "--share", "0.5"], "--share goes with --adapter"),
        (["--run", "{run}", "--adapter", "x.safetensors", "--share", "2"], "at most 1, not 2.0"),
        (["--general", "--encoder", "minilm"], "--encoder does not go with --general"),
        (["--run", "{run}", "--adapter", "{out}/x.safetensors"], "lies in the bundle"),
    ],
)
def test_options_that_make_no_sense(
    told: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = [word.format(run=run, out=tmp_path / "bundle") for word in told]
    assert export([*told, "--out", str(tmp_path / "bundle")]) == 2
    assert message in capsys.readouterr().err

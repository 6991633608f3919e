"""Bundles of text predictors: from token ids to a vector in every runtime, the tokenizer beside them."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny_bert
import torch
from consumers import consume
from safetensors.numpy import load_file, save_file
from tiny_text import text_config, text_model

import prime_jax
from prime_jax.data.conversations import ConversationTokenizer
from prime_jax.errors import CheckpointError, ConfigError, DataError
from prime_jax.export import inspection, verification
from prime_jax.export.__main__ import main as export
from prime_jax.export.from_torch import from_torch
from prime_jax.export.golden import module_of
from prime_jax.export.to_torch import state_dict
from prime_jax.files import read_json
from prime_jax.manifest import write_manifest
from prime_jax.train import checkpoints
from prime_jax.train.__main__ import main as train

CONFIG = Path(__file__).parents[2] / "configs" / "text.yaml"
LONG = " ".join(["quiet hills and dogs ran home"] * 9)
CONTEXTS = [
    ["the cat sat", "rain fell on a mat"],
    [],
    ["Dogs [SEP] ran [CLS] home", "[PAD] the [SEP]"],
    [LONG, "the cat", LONG, "rain"],
    [f"the {word}" for word in tiny_bert.WORDS],
    ["", " "],
]
READ = [turns[-10:] for turns in CONTEXTS]  # a predictor refuses more turns than it reads
QUERIES = ["and dogs?", "the cat sat on a mat", "a [SEP] b [MASK]", "quiet", "home", ""]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    encoder = tiny_bert.write_folder(folder / "tiny", tiny_bert.tensors())
    data = tiny_bert.write_texts(folder / "data")
    options = [
        *("--config", str(CONFIG), "--model.input-dim", "32", "--model.output-dim", "32"),
        *("--model.max-tokens", "32", "--train.batch-size", "8", "--train.num-epochs", "1"),
        *("--train.learning-rate", "0.01", "--data.encoder", str(encoder), "--data.path", str(data)),
        *("--mesh.data", "1", "--data.query-prefix", "and "),
    ]
    assert train([*options, "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def bundle(run: Path) -> Path:
    out = run.parent / "bundle"
    lower = ("--precision", "fp32,fp16,int8", "--allow-loss", "--triton", str(run.parent / "triton"))
    assert export(["--run", str(run), "--out", str(out), *lower]) == 0
    return out


@pytest.fixture(scope="module")
def predictor(bundle: Path) -> prime_jax.Predictor:
    return prime_jax.load(bundle)


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def runtime(bundle: Path) -> Any:
    """The bundle's own file as a module."""
    return module_of((bundle / "torch_runtime.py").read_text(), "torch_runtime.py")


def onnx(bundle: Path, ids: np.ndarray, mask: np.ndarray, file: str = "model.onnx") -> np.ndarray:
    session = onnxruntime.InferenceSession(bundle / file)
    feeds = {"input_ids": ids.astype(np.int32), "attention_mask": mask.astype(np.int32)}
    return np.asarray(session.run(["embedding"], feeds)[0])


def test_what_a_bundle_holds(run: Path, bundle: Path) -> None:
    """The checkpoint's tokenizer and confidence; figures of every runtime and precision."""
    best = checkpoints.best(run).folder
    for name in ("tokenizer.json", "confidence.safetensors"):
        assert (bundle / name).read_bytes() == (best / name).read_bytes()
    config, parity = read_json(bundle / "config.json"), read_json(bundle / "parity.json")
    assert config["inputs"] == {
        name: {"dtype": "int32", "shape": ["B", "T"]} for name in ("input_ids", "attention_mask")
    }
    assert config["output"]["embedding"]["shape"] == ["B", 32]
    assert config["encoder"].startswith("tiny-mean-")
    assert config["query_prefix"] == "and "
    for name in ("onnxruntime", "torch"):
        assert 0 < parity[name]["max_abs_difference"] < 1e-5
    company = parity["batch_independence"]
    assert company["tokens"] == 32
    assert company["max_abs_difference"]["fp32"] < 1e-6
    assert company["padding"]["fp32"]["max_abs_difference"] < 1e-6
    assert set(parity["precisions"]) == {"fp16", "int8"}
    for found in parity["precisions"].values():
        assert (found["queries"], found["split"]) == (13, "dev")
        assert found["cosine_min"] > 0.98
    assert parity["leak_check"]["why"] == "fewer than ten conversations on one side"
    sizes = [(bundle / name).stat().st_size for name in ("model.fp16.onnx", "model.onnx")]
    assert sizes[0] < 0.75 * sizes[1]


def test_the_validation_figure_is_that_of_training(run: Path, bundle: Path) -> None:
    """Conversations, not embeddings, went into the files: R@10 is what training measured."""
    found = read_json(bundle / "parity.json")["precisions"]["fp16"]
    expected = checkpoints.best(run).facts["metrics"]["R@10"]
    assert found["R@10"] + found["loss"] == pytest.approx(expected, abs=1e-6)


def test_answers_are_the_checkpoints(run: Path, predictor: prime_jax.Predictor) -> None:
    expected = prime_jax.load(run).predict_text(READ, QUERIES)
    np.testing.assert_array_equal(predictor.predict_text(READ, QUERIES), expected)
    assert predictor.confidence is not None
    with pytest.raises(prime_jax.PredictorError, match="reads texts, no embeddings"):
        predictor.predict(np.ones((1, 32), np.float32), np.ones(32, np.float32))


def test_tokens_in_torch_are_those_of_training(
    bundle: Path, predictor: prime_jax.Predictor, runtime: Any
) -> None:
    """Special tokens spelled out, empty texts, more turns than are read, sequences that are cut."""
    config = predictor.model.config
    assert config.kind == "text"
    ours = ConversationTokenizer.of_model(config, bundle / "tokenizer.json")
    sequences = ours(CONTEXTS, ["and " + query for query in QUERIES])
    ids, mask = runtime.load_tokenizer(bundle)(CONTEXTS, QUERIES)
    assert ids.shape == mask.shape == (6, 32)
    assert ours.cut == 2
    for row in range(len(QUERIES)):
        own = sequences.tokens[sequences.starts[row] : sequences.starts[row + 1]]
        np.testing.assert_array_equal(ids[row, mask[row] > 0], own)
        assert mask[row].sum() == len(own)
    assert (ids[2] == 3).sum() == 3  # a "[SEP]" in a text separates nothing
    assert [part.shape for part in runtime.load_tokenizer(bundle)([], [])] == [(0, 0)] * 2


def test_the_same_vectors_everywhere(bundle: Path, predictor: prime_jax.Predictor, runtime: Any) -> None:
    expected = predictor.predict_text(READ, QUERIES)
    ids, mask = runtime.load_tokenizer(bundle)(CONTEXTS, QUERIES)
    model = runtime.load_bundle(bundle)
    with torch.inference_mode():
        np.testing.assert_allclose(model(ids, mask), expected, atol=1e-5)
        np.testing.assert_allclose(model(ids[:0], mask[:0]), np.zeros((0, 32)))
    np.testing.assert_allclose(onnx(bundle, ids.numpy(), mask.numpy()), expected, atol=1e-5)
    assert model.get_num_params() == predictor.model.num_params()


@pytest.mark.parametrize("file", ["model.onnx", "model.fp16.onnx", "model.int8.onnx"])
def test_no_row_depends_on_its_neighbours_or_padding(bundle: Path, runtime: Any, file: str) -> None:
    ids, mask = (part.numpy() for part in runtime.load_tokenizer(bundle)(CONTEXTS, QUERIES))
    together = onnx(bundle, ids, mask, file)
    other = np.where(mask > 0, ids, np.random.default_rng(0).integers(0, 20, ids.shape))
    np.testing.assert_allclose(onnx(bundle, other, mask, file), together, atol=1e-6)
    for row, length in enumerate(mask.sum(axis=1)):
        alone = onnx(bundle, ids[row : row + 1], mask[row : row + 1], file)
        np.testing.assert_allclose(alone[0], together[row], atol=1e-6)
        bare = onnx(bundle, ids[row : row + 1, :length], mask[row : row + 1, :length], file)
        assert float(bare[0] @ together[row]) > (0.999999 if file == "model.onnx" else 0.99)
    assert onnx(bundle, ids[:0], mask[:0], file).shape == (0, 32)


def test_verify_repeats_the_golden_requests(bundle: Path, capsys: Any) -> None:
    assert verification.main([str(bundle), "--run-onnx", "--run-torch"]) == 0
    said = capsys.readouterr().out
    for file in ("model.onnx: 11", "torch_runtime.py: 11"):
        assert f"{file} golden requests in" in said
    assert "model.int8.onnx: smallest cosine" in said


def test_inspect(bundle: Path, capsys: Any) -> None:
    assert inspection.main([str(bundle)]) == 0
    assert "text, bert of 2 layers of 32" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_damaged_tokenizer_is_found_by_every_reader(copied: Path, runtime: Any, damage: str) -> None:
    file = copied / "tokenizer.json"
    text = file.read_bytes()
    file.unlink() if damage == "missing" else file.write_bytes(text[:-2] + b" " + text[-1:])
    for read in (runtime.load_bundle, runtime.load_tokenizer):
        with pytest.raises(runtime.CheckpointError, match=r"tokenizer\.json"):
            read(copied)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        prime_jax.load(copied)
    assert verification.main([str(copied)]) == 1


def test_another_tokenizer_under_a_new_manifest(copied: Path, runtime: Any) -> None:
    vocabulary = [*tiny_bert.VOCABULARY]
    tiny_bert.write_tokenizer(copied / "tokenizer.json", vocabulary)
    text = (copied / "tokenizer.json").read_text().replace('["[SEP]",3]', '["[SEP]",5]')
    changed = re.sub(r'(\[\s*"\[SEP\]",\s*)3', r"\g<1>5", text)
    (copied / "tokenizer.json").write_text(changed)
    told = read_json(copied / "manifest.json")
    write_manifest(copied, "bundle", onnx=told["onnx"], model_version=told["model_version"])
    with pytest.raises(runtime.CheckpointError, match=r"tokenizer\.json: frames texts by \[2, 5\]"):
        runtime.load_tokenizer(copied)
    with pytest.raises(DataError, match="separates texts by token 5"):
        prime_jax.load(copied).predict_text([], "the cat")
    (copied / "tokenizer.json").write_text("{")
    write_manifest(copied, "bundle", onnx=told["onnx"], model_version=told["model_version"])
    with pytest.raises(runtime.CheckpointError, match="not a readable tokenizer"):
        runtime.load_tokenizer(copied)


def test_the_same_model_gives_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert export(["--run", str(bundle), "--out", str(tmp_path / name)]) == 0
    one, two = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "two")
    )
    assert one == two


def test_trained_further_in_torch_and_back(bundle: Path, tmp_path: Path, runtime: Any) -> None:
    model = runtime.load_bundle(bundle).train()
    ids, mask = runtime.load_tokenizer(bundle)(CONTEXTS, QUERIES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids, mask)[:, 0].sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())
    optimizer.step()
    torch.save(model.state_dict(), tmp_path / "tuned.pt")
    back = from_torch(tmp_path / "tuned.pt", bundle / "config.json")
    for name, array in state_dict(back).items():
        np.testing.assert_array_equal(array, model.state_dict()[name].numpy())
    words = ["--torch", str(tmp_path / "tuned.pt"), "--like", str(bundle), "--out", str(tmp_path / "again")]
    assert export(words) == 0
    with torch.inference_mode():
        expected = model(ids, mask)
    found = prime_jax.load(tmp_path / "again").predict_text(READ, QUERIES)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_tensors_and_inputs_that_torch_refuses(copied: Path, runtime: Any) -> None:
    model = runtime.load_bundle(copied)
    ids = torch.zeros(1, 33, dtype=torch.int64)
    for given, message in (
        ((ids, ids), "33 tokens, the model reads at most 32"),
        ((ids[:, :5], ids[:, :4]), r"must both have shape \[B, T\]"),
        ((ids[:, :5].float(), ids[:, :5]), "expected integers"),
    ):
        with pytest.raises(runtime.PredictorError, match=message):
            model(*given)
    tensors = load_file(copied / "model.safetensors")
    save_file({**tensors, "roles": tensors["roles"][:2]}, copied / "model.safetensors")
    write_manifest(copied, "bundle", onnx={"fp32": "model.onnx"})
    with pytest.raises(runtime.CheckpointError, match=r"'roles' is torch.float32 \(2, 32\)"):
        runtime.load_bundle(copied)


def test_code_on_the_card_runs(
    bundle: Path, predictor: prime_jax.Predictor, runtime: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (bundle / "MODEL_CARD.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(bundle.parent)
    monkeypatch.setitem(sys.modules, "torch_runtime", runtime)
    for turns, query in zip(READ[2:4], QUERIES[2:4], strict=True):
        expected = predictor.predict_text(turns, query)
        for block in blocks:
            names = {"turns": turns, "query": query}
            exec(block, names)
            found: Any = names["embedding"]
            found = found.detach().numpy() if isinstance(found, torch.Tensor) else found
            np.testing.assert_allclose(np.ravel(found), expected, atol=1e-5)


def test_scripts_of_consumers(bundle: Path) -> None:
    """Those that take any bundle, and one that needs a model of embeddings."""
    for script in ("predict_onnx.py", "load_torch.py"):
        done = consume(script, str(bundle))
        assert done.returncode == 0, done.stderr
        assert "golden requests: 11, largest difference" in done.stdout
    done = consume("mcs_search.py", str(bundle), str(bundle.parent / "data"))
    assert done.returncode == 2
    assert "its model reads texts, not embeddings; MODEL_CARD.md shows how" in done.stderr


def test_the_card_says_what_it_reads(bundle: Path) -> None:
    card = (bundle / "MODEL_CARD.md").read_text()
    assert "`[CLS] and query [SEP] newest turn [SEP] the one before [SEP] ...`, cut at 32" in card
    assert "the query and up to 10 turns" in card
    assert "It searches passages as the encoder `tiny-mean-" in card
    assert "beside a row of 32 tokens" in card
    assert re.search(r"Padding behind them changes them by at most \d\.\de-0[78] in fp32 \(cosine", card)
    assert "| `input_ids` | int32 [B, T] |" in card


def test_triton(bundle: Path) -> None:
    folder = bundle.parent / "triton"
    assert sorted(path.name for path in folder.iterdir()) == [
        *("prime_predictor", "prime_predictor_fp16", "prime_predictor_int8")
    ]
    text = (folder / "prime_predictor" / "config.pbtxt").read_text()
    for name in ("input_ids", "attention_mask"):
        assert f'input {{\n  name: "{name}"\n  data_type: TYPE_INT32\n  dims: [ -1 ]\n}}' in text
    assert "dims: [ 32 ]" in text


def test_a_model_in_memory_has_no_tokenizer() -> None:
    predictor = prime_jax.Predictor.from_model(text_model(text_config()))
    with pytest.raises(ConfigError, match="has no tokenizer"):
        predictor.predict_text([], "the cat")

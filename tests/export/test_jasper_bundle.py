"""Bundles of steered models: the same files, one more proof for each output, refusals, and the way back."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from consumers import consume
from safetensors.numpy import load_file, save_file
from steered_models import D, K, Steered, answers, feeds, make, requests, unit_vectors

from prime_jax.errors import CheckpointError, ExportError, PredictorError
from prime_jax.evaluate.arrays import Corpus, Split
from prime_jax.export import bundle as module
from prime_jax.export import golden, inspection, torch_jasper, verification
from prime_jax.export.__main__ import main
from prime_jax.export.bundle import Options, write_bundle
from prime_jax.export.evidence import Evidence
from prime_jax.export.from_torch import from_torch
from prime_jax.export.to_torch import state_dict
from prime_jax.export.triton import model_config
from prime_jax.files import read_json
from prime_jax.manifest import write_manifest
from prime_jax.models.bundle import load_bundle

FILES = [
    *("MODEL_CARD.md", "config.json", "golden.safetensors", "manifest.json", "model.onnx"),
    *("model.safetensors", "parity.json", "torch_runtime.py"),
]
OUTPUTS = {"jasper": ["embedding"], "subspace": ["embedding", "routing", "coarse", "fine"]}
FACTS = {"encoder": "minilm-0123", "query_prefix": "q: ", "steering": "predicted", "step": 120}


def model(kind: str) -> Steered:
    return make(kind, residual="query", max_delta=0.4, use_torch_compile=False)


@pytest.fixture(scope="module", params=["jasper", "subspace"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def written(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "bundle"
    write_bundle(model(kind), folder, facts=FACTS)
    return folder


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "bundle"))


def test_files_and_bytes(kind: str, written: Path, copied: Path) -> None:
    """The usual files, torch_jasper.py as torch_runtime.py, and the same bytes when it is written again."""
    assert sorted(file.name for file in written.iterdir()) == FILES
    assert (written / "torch_runtime.py").read_bytes() == Path(torch_jasper.__file__).read_bytes()
    write_bundle(model(kind), copied, facts=FACTS)
    for name in FILES:
        assert (copied / name).read_bytes() == (written / name).read_bytes(), name


def test_config_names_inputs_and_outputs(kind: str, written: Path) -> None:
    config = read_json(written / "config.json")
    assert config["model"]["kind"] == kind
    assert config["inputs"] == {
        "context": {"dtype": "float32", "shape": ["B", 1, D]},
        "context_mask": {"dtype": "bool", "shape": ["B", 1]},
        "query": {"dtype": "float32", "shape": ["B", D]},
    }
    sizes = {"embedding": D, "routing": K, "coarse": D, "fine": D}
    assert {name: facts["shape"] for name, facts in config["output"].items()} == {
        name: ["B", sizes[name]] for name in OUTPUTS[kind]
    }
    assert config["output"]["embedding"]["normalised"] is True
    assert config["steering"] == read_json(written / "manifest.json")["steering"] == "predicted"


def test_golden_requests_hold_every_output(kind: str, written: Path) -> None:
    """Sixteen questions, the even ones without steering but with a vector in the masked slot."""
    arrays = load_file(written / "golden.safetensors")
    assert arrays.keys() == {"context", "context_mask", "query", *OUTPUTS[kind]}
    np.testing.assert_array_equal(arrays["context_mask"][:, 0], np.arange(16) % 2 == 1)
    for name in ("context", "query", "embedding"):
        np.testing.assert_allclose(np.linalg.norm(arrays[name], axis=-1), 1, atol=1e-6)
    expected = answers(model(kind), *(arrays[name] for name in ("context", "query", "context_mask")))
    for name, array in expected.items():
        np.testing.assert_allclose(arrays[name], array, atol=1e-6)
    if kind == "subspace":
        np.testing.assert_allclose(arrays["routing"].sum(axis=1), 1, atol=1e-6)
        np.testing.assert_array_equal(arrays["embedding"], arrays["coarse"] + arrays["fine"])


def test_parity_is_measured_for_every_output(kind: str, written: Path) -> None:
    parity = read_json(written / "parity.json")
    assert parity["rows"] == 16
    for runtime in ("onnxruntime", "torch"):
        found = parity[runtime]
        assert found["checked"] is True
        assert 0 < found["max_abs_difference"] < 1e-5
        assert 1 - 1e-9 < found["min_cosine"] < 1 + 1e-9
        if kind == "jasper":
            assert "outputs" not in found
            continue
        assert list(found["outputs"]) == OUTPUTS[kind]
        worst = max(one["max_abs_difference"] for one in found["outputs"].values())
        assert worst == found["max_abs_difference"]
        assert found["outputs"]["routing"]["same_choice"] is True


def test_comes_back_in_jax_and_in_torch(kind: str, written: Path) -> None:
    given = requests(20)
    expected = answers(model(kind), *given)
    loaded = load_bundle(written).model
    assert loaded.config.kind == kind
    for name, array in answers(loaded, *given).items():
        np.testing.assert_array_equal(array, expected[name])
    torch_model = golden.module_of(
        (written / "torch_runtime.py").read_text(), "torch_runtime.py"
    ).load_bundle(written)
    assert not torch_model.training
    got = torch_model.details(*map(torch.from_numpy, given))._asdict()
    for name, array in expected.items():
        np.testing.assert_allclose(got[name].detach(), array, atol=1e-5)
    again = from_torch(written)
    for name, array in state_dict(again).items():
        np.testing.assert_array_equal(array, state_dict(loaded)[name])


def test_verify_inspect_and_triton(kind: str, written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verification.main([str(written), "--run-onnx", "--run-torch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == [
        "model.onnx: 16 golden requests in onnxruntime",
        "torch_runtime.py: 16 golden requests in torch",
    ]
    assert inspection.main([str(written)]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"{model(kind).num_params():,} parameters: {kind}, stacks of 2 blocks of 32" in shown
    assert ("5 subspaces, routing softmax" in shown) == (kind == "subspace")
    assert inspection.main([str(written), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["model"]["kind"], described["parameters"]) == (kind, model(kind).num_params())
    served = model_config("jasper", read_json(written / "config.json"))
    assert served.count("output {") == len(OUTPUTS[kind])
    assert ('name: "routing"\n  data_type: TYPE_FP32\n  dims: [ 5 ]' in served) == (kind == "subspace")


def test_exports_again_what_it_loads(written: Path, tmp_path: Path) -> None:
    assert main(["--run", str(written), "--out", str(tmp_path / "again")]) == 0
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (written / name).read_bytes(), name


def test_the_card_says_how_to_steer(kind: str, written: Path) -> None:
    card = (written / "MODEL_CARD.md").read_text()
    assert "from the embedding of a question and a steering vector" in card
    assert f"| `context` | float32 [B, 1, {D}] | Steering vector in the place of the one turn" in card
    assert "the steering vectors were those of `predicted`" in card
    assert "golden requests (golden.safetensors), every second one without steering" in card
    assert "turns" not in card
    assert ("| onnxruntime, `routing` |" in card) == (kind == "subspace")


@pytest.mark.parametrize("script", ["predict_onnx.py", "load_torch.py"])
def test_consumers_without_jax_open_it(written: Path, script: str) -> None:
    done = consume(script, str(written))
    assert done.returncode == 0, done.stderr
    assert "golden requests: 16, largest difference" in done.stdout


@pytest.mark.parametrize("name", ["golden.safetensors", "model.safetensors", "torch_runtime.py"])
def test_a_flipped_byte_is_found(copied: Path, name: str) -> None:
    data = bytearray((copied / name).read_bytes())
    data[-1] ^= 1
    (copied / name).write_bytes(data)
    with pytest.raises(torch_jasper.CheckpointError, match=name):
        torch_jasper.load_bundle(copied)
    with pytest.raises(CheckpointError, match=name):
        load_bundle(copied)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "has no section 'model'"),
        ({"model": {"kind": "prime"}}, "model.kind 'prime' is not jasper or subspace"),
        ({"model": {"kind": "jasper", "input_dim": 3}}, "model.hidden_dim is missing"),
    ],
)
def test_sealed_nonsense_is_named(copied: Path, config: dict[str, Any], message: str) -> None:
    (copied / "config.json").write_text(json.dumps(config))
    write_manifest(copied, "bundle", onnx={"fp32": "model.onnx"})
    with pytest.raises(torch_jasper.CheckpointError, match=rf"config\.json: {message}"):
        torch_jasper.load_bundle(copied)


def test_a_size_that_is_none_is_named(copied: Path) -> None:
    """By the bundle's own file, which the tests' type checks do not reach."""
    config = read_json(copied / "config.json")
    config["model"]["hidden_dim"] = "wide"
    (copied / "config.json").write_text(json.dumps(config))
    write_manifest(copied, "bundle", onnx={"fp32": "model.onnx"})
    runtime = golden.module_of((copied / "torch_runtime.py").read_text(), "torch_runtime.py")
    with pytest.raises(runtime.CheckpointError, match=r"config\.json: .*hidden_dim 'wide' is not a whole"):
        runtime.load_bundle(copied)


def test_verify_notices_another_routing_and_a_missing_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Golden answers changed and sealed anew: as good as a machine that routes otherwise."""
    folder = tmp_path / "bundle"
    write_bundle(model("subspace"), folder, facts={})
    facts = {"onnx": read_json(folder / "manifest.json")["onnx"]}
    arrays = load_file(folder / "golden.safetensors")
    save_file({**arrays, "routing": arrays["routing"][:, ::-1].copy()}, folder / "golden.safetensors")
    write_manifest(folder, "bundle", **facts)
    assert verification.main([str(folder), "--run-onnx"]) == 1
    assert "model.onnx: onnxruntime differs from the golden answers by" in (found := capsys.readouterr().err)
    assert "in routing on this machine" in found
    del arrays["fine"]
    save_file(arrays, folder / "golden.safetensors")
    write_manifest(folder, "bundle", **facts)
    assert verification.main([str(folder), "--run-torch"]) == 1
    assert "output 'fine': the golden answers have none" in capsys.readouterr().err


@pytest.mark.parametrize("name", OUTPUTS["subspace"])
def test_an_export_that_disagrees_in_any_output_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    true = golden.jax_answers

    def moved(*given: Any) -> golden.Arrays:
        found = true(*given)
        return {**found, name: found[name] + np.float32(1e-4)}

    monkeypatch.setattr(module, "jax_answers", moved)
    with pytest.raises(
        ExportError, match=rf"onnxruntime differs from JAX by 0\.0001 in {name} on the golden"
    ):
        write_bundle(model("subspace"), tmp_path / "bundle", facts={})
    assert list(tmp_path.iterdir()) == []


def test_another_choice_within_the_tolerance_is_refused() -> None:
    """Two subspaces as good as equal: the weights agree, what a user would be told does not."""
    ours = {"embedding": np.ones((1, 2)), "routing": np.array([[0.5, 0.5 + 1e-7]])}
    theirs = {"embedding": np.ones((1, 2)), "routing": np.array([[0.5 + 1e-7, 0.5]])}
    with pytest.raises(ExportError, match="torch chooses another subspace than JAX"):
        golden._agreement("torch", theirs, ours)


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "'centroids' holds NaN or Inf"), (0.0, "all its centroids are zero, it was never trained")],
)
def test_bad_centroids_are_not_exported(tmp_path: Path, value: float, message: str) -> None:
    broken = model("subspace")
    centroids = broken.centroids[...]
    broken.centroids[...] = 0 * centroids if value == 0 else centroids.at[3, 4].set(value)
    with pytest.raises(ExportError, match=message):
        write_bundle(broken, tmp_path / "bundle", facts={})
    assert list(tmp_path.iterdir()) == []


def test_tampered_centroids_are_refused_on_loading(tmp_path: Path) -> None:
    """NaN in the weights, sealed anew."""
    folder = tmp_path / "bundle"
    write_bundle(model("subspace"), folder, facts={})
    tensors = load_file(folder / "model.safetensors")
    for change, message in (
        ({"centroids": np.full((K, D), np.nan, np.float32)}, "'centroids' holds NaN or Inf"),
        ({"centroids": np.ones((K + 1, D), np.float32)}, r"'centroids' .*\(6, 24\)"),
    ):
        save_file({**tensors, **change}, folder / "model.safetensors")
        write_manifest(folder, "bundle", onnx={"fp32": "model.onnx"})
        with pytest.raises(torch_jasper.CheckpointError, match=message):
            torch_jasper.load_bundle(folder)
        with pytest.raises(CheckpointError, match=message):
            load_bundle(folder)


def test_lower_precisions_give_explanations_too(kind: str, tmp_path: Path) -> None:
    """Judged on forty questions; the golden requests also say how often they choose the same subspace."""
    context, query, mask = requests(40)
    passages = unit_vectors(np.random.default_rng(5), 60)
    right = [np.array([row], np.int64) for row in range(40)]
    split = Split(query, np.where(mask[..., None], context, 0).astype(np.float32), mask, right)
    leak = {"measured": False, "why": "a test"}
    inputs = {"context": split.context, "context_mask": split.mask, "query": split.query}
    evidence = Evidence(split, Corpus(passages), np.arange(40), leak, inputs)
    options = Options(precisions=("fp32", "fp16", "int8"), max_loss=1.0)
    folder = tmp_path / "bundle"
    parity = write_bundle(model(kind), folder, facts={}, options=options, evidence=evidence)
    given = feeds(split.context, query, mask)
    expected = answers(model(kind), split.context, query, mask)
    for name, room in (("fp16", 5e-3), ("int8", 0.2)):
        found = parity["precisions"][name]
        assert found["golden_min_cosine"] > 1 - room
        assert found.get("golden_same_choice", 1) > 0.9
        assert ("golden_same_choice" in found) == (kind == "subspace")
        got = onnxruntime.InferenceSession(folder / f"model.{name}.onnx").run(OUTPUTS[kind], given)
        for output, array in zip(OUTPUTS[kind], got, strict=True):
            assert array.dtype == np.float32
            np.testing.assert_allclose(array, expected[output], atol=room * 2)
    assert verification.main([str(folder), "--run-onnx"]) == 0


def test_weights_of_the_state_dict_come_back(kind: str, written: Path, tmp_path: Path) -> None:
    loaded = torch_jasper.load_bundle(written)
    torch.save(loaded.state_dict(), tmp_path / "tuned.pt")
    again = from_torch(tmp_path / "tuned.pt", written / "config.json")
    for name, array in state_dict(again).items():
        np.testing.assert_array_equal(array, loaded.state_dict()[name])
    other = make(kind, residual="query", max_delta=0.2).config
    with pytest.raises(PredictorError, match=r"was saved with max_delta 0\.4, the config given says 0\.2"):
        from_torch(written, other)
    with pytest.raises(PredictorError, match=r"state_dict: model\.kind 'rnn' is none of prime, jasper, subs"):
        from_torch({}, {"kind": "rnn"})

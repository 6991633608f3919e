"""A really trained run handed over with everything: lower precisions, leak check, card, Triton, signature."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import onnxruntime
import pytest
import torch
from consumers import PYTHON
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from prime_jax.config import read_config
from prime_jax.errors import CheckpointError, ExportError
from prime_jax.evaluate.run import evaluate_run
from prime_jax.export import inspection, verification
from prime_jax.export.__main__ import main
from prime_jax.export.signing import sign, verify_signature
from prime_jax.files import read_json
from prime_jax.manifest import write_manifest
from prime_jax.predict.predictor import load
from prime_jax.train import loop

SETTINGS = [
    *("--model.input-dim", f"{fakes.DIM}", "--model.output-dim", f"{fakes.DIM}", "--model.hidden-dim", "128"),
    *("--model.num-layers", "1", "--model.num-heads", "4", "--model.max-context-length", "4"),
    *("--model.use-torch-compile", "false", "--model.residual", "copy", "--mesh.data", "1"),
    *("--train.batch-size", "32", "--train.num-epochs", "2", "--train.warmup-steps", "2"),
    *("--train.learning-rate", "0.003", "--data.encoder", "fakes:encoder"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    fakes.write_conversations(folder / "data", chats=72)
    config = read_config(None, [*SETTINGS, "--data.path", str(folder / "data")])
    loop.train(config, folder / "run")
    evaluate_run(folder / "run", folder / "data", "test", folder / "run" / "report", encoder="fakes:encoder")
    return folder / "run"


def test_the_guard_goes_back_to_the_mix_that_the_report_tunes_on_dev(run: Path) -> None:
    report = read_json(run / "report" / "report.json")
    confidence = load(run, precision="float32", encoder="fakes:encoder").confidence
    assert confidence is not None
    tuned = report["settings"]["recency_mix"]
    assert confidence.fallback_mix == pytest.approx((tuned["weight"], tuned["decay"]))
    assert confidence.fallback_mix.weight > 0
    assert report["guard"]["fallback"] == str(confidence.fallback_mix)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a.pem` and `a.pub`, `b.pem` (encrypted) and `b.pub`."""
    folder = tmp_path_factory.mktemp("keys")
    for name, lock in (
        ("a", serialization.NoEncryption()),
        ("b", serialization.BestAvailableEncryption(b"secret")),
    ):
        key = ec.generate_private_key(ec.SECP256R1())
        pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        (folder / f"{name}.pem").write_bytes(key.private_bytes(pem, pkcs8, lock))
        public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pub").write_bytes(public)
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, keys: Path) -> Path:
    out = run.parent / "bundle"
    words = [
        "--encoder",
        "fakes:encoder",
        "--run",
        str(run),
        "--out",
        str(out),
        "--precision",
        "int8,fp16",
        "--state-dict",
    ]
    words += ["--triton", str(run.parent / "triton"), "--sign", str(keys / "a.pem"), "--max-loss", "1"]
    words += ["--model-version", "2.1.0", "--licence", "CC-BY-4.0"]
    assert main(words) == 0
    return out


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    """Under another name: a bundle may be moved."""
    return Path(shutil.copytree(exported, tmp_path / "moved"))


def test_every_precision_is_there_with_what_it_loses(exported: Path) -> None:
    parity = read_json(exported / "parity.json")
    assert list(parity["precisions"]) == ["fp16", "int8"]
    for name, least in (("fp16", 0.9999), ("int8", 0.98)):
        found = parity["precisions"][name]
        assert least < found["cosine_min"] <= found["cosine_mean"] <= 1.0001
        assert found["queries"] == 60
        low, high = found["loss_interval"]
        assert low <= found["loss"] <= high
    assert parity["precisions"]["int8"]["cosine_mean"] < parity["precisions"]["fp16"]["cosine_mean"]
    sizes = [(exported / f"model{name}.onnx").stat().st_size for name in ("", ".fp16", ".int8")]
    assert sizes[0] > 1.8 * sizes[1] > 2.5 * sizes[2]


def test_lower_precisions_take_any_batch_and_ignore_padding(exported: Path) -> None:
    rng = np.random.default_rng(0)
    query = rng.normal(size=(9, fakes.DIM)).astype(np.float32)
    mask = np.arange(4) < (np.arange(9) % 5)[:, None]
    context = np.where(mask[..., None], rng.normal(size=(9, 4, fakes.DIM)), np.nan).astype(np.float32)
    for name, room in (("fp16", 0.999), ("int8", 0.98)):
        given = onnxruntime.InferenceSession(exported / f"model.{name}.onnx")
        assert given.get_modelmeta().custom_metadata_map["precision"] == name
        exact = onnxruntime.InferenceSession(exported / "model.onnx")
        feeds = {"context": context, "context_mask": mask, "query": query}
        (ours,), (theirs,) = given.run(None, feeds), exact.run(None, feeds)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=2e-3)
        assert (ours * theirs).sum(axis=1).min() > room


def test_the_state_dict_is_the_weights(exported: Path) -> None:
    from safetensors.torch import load_file

    plain = torch.load(exported / "model.pt", weights_only=True)
    weights = load_file(exported / "model.safetensors")
    assert plain.keys() == weights.keys()
    assert all(torch.equal(plain[name], weights[name]) for name in weights)


def test_the_card_states_version_intervals_losses_leak_and_licence(exported: Path) -> None:
    card = (exported / "MODEL_CARD.md").read_text()
    assert "Version 2.1.0" in card
    assert "Weights: CC-BY-4.0." in card
    loss = read_json(exported / "parity.json")["precisions"]["int8"]
    assert f"| `model.int8.onnx` | {loss['cosine_mean']:.5f} / {loss['cosine_min']:.5f} |" in card
    assert "conversations that were, 12 of the test split that were not" in card
    assert "| closeness of the plain query (knows no training) | 0." in card
    assert "| too few to say |" in card  # a share at one in a hundred, of twelve
    report = read_json(exported.parent / "run" / "report" / "report.json")
    low, high = report["intervals"]["predicted"]["MRR@10"]
    assert f"{report['methods']['predicted']['MRR@10']:.4f} [{low:.3f}, {high:.3f}]" in card
    metadata = onnxruntime.InferenceSession(exported / "model.onnx").get_modelmeta().custom_metadata_map
    manifest = read_json(exported / "manifest.json")
    assert metadata["model_version"] == manifest["model_version"] == "2.1.0"
    assert metadata["weights_sha256"] == manifest["files"]["model.safetensors"]["sha256"]
    assert metadata["encoder"] == manifest["encoder"] == "bag-of-words"


def test_the_same_run_gives_the_same_bytes(run: Path, exported: Path, tmp_path: Path) -> None:
    words = [
        "--encoder",
        "fakes:encoder",
        "--run",
        str(run),
        "--out",
        str(tmp_path / "b"),
        "--precision",
        "fp32,fp16,int8",
        "--state-dict",
    ]
    words += ["--max-loss", "1", "--model-version", "2.1.0", "--licence", "CC-BY-4.0"]
    assert main(words) == 0
    for file in (tmp_path / "b").iterdir():
        assert file.read_bytes() == (exported / file.name).read_bytes(), file.name


def test_a_precision_that_loses_too_much_is_refused_unless_accepted(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--encoder",
        "fakes:encoder",
        "--run",
        str(run),
        "--out",
        str(tmp_path / "b"),
        "--precision",
        "int8",
        "--max-loss",
        "-1",
    ]
    assert main(words) == 2
    assert "int8 loses " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main([*words, "--allow-loss"]) == 0
    assert (tmp_path / "b" / "model.int8.onnx").is_file()


def test_a_precision_without_data_is_refused(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bundle knows no data folder."""
    assert main(["--run", str(exported), "--out", str(tmp_path / "b"), "--precision", "int8"]) == 2
    assert "int8 is only written with what it loses on validation data" in capsys.readouterr().err
    assert main(["--run", str(exported), "--out", str(tmp_path / "b"), "--precision", "int4"]) == 2
    assert "unknown precision 'int4'; choose from fp32, fp16, int8" in capsys.readouterr().err


def test_other_data_than_it_was_trained_on_measures_no_leak(run: Path, tmp_path: Path) -> None:
    fakes.write_conversations(tmp_path / "data", chats=24)
    words = [
        "--encoder",
        "fakes:encoder",
        "--run",
        str(run),
        "--out",
        str(tmp_path / "b"),
        "--data",
        str(tmp_path / "data"),
    ]
    assert main(words) == 0
    why = "the data is not what the model was trained on"
    assert read_json(tmp_path / "b" / "parity.json")["leak_check"] == {"measured": False, "why": why}
    assert f"Not measured: {why}." in (tmp_path / "b" / "MODEL_CARD.md").read_text()


def test_verify_repeats_everything(exported: Path, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(exported), "--run-onnx", "--run-torch", "--public-key", str(keys / "a.pub")]
    assert verification.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        str(exported),
        f"signed by the owner of {keys / 'a.pub'}",
        "model.onnx",
        "model.fp16.onnx",
        "model.int8.onnx",
        "torch_runtime.py",
    ]
    assert "bundle, version 2.1.0, 11 files" in lines[0]


def test_verify_says_what_is_wrong_and_with_which_exit_code(
    run: Path, copied: Path, keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verification.main([str(copied)]) == 0
    assert "signed, but by whom is not checked" in capsys.readouterr().out
    assert verification.main([str(copied), "--public-key", str(keys / "b.pub")]) == 1
    assert "the signature does not hold" in capsys.readouterr().err
    (copied / "parity.json").write_text("{}")
    assert verification.main([str(copied)]) == 1
    assert "parity.json: 2 bytes, manifest.json says" in capsys.readouterr().err
    assert verification.main([str(run)]) == 0
    assert verification.main([str(run), "--run-onnx"]) == 2
    assert "golden requests are in bundles only" in capsys.readouterr().err
    assert verification.main([str(tmp_path / "nothing")]) == 2
    assert "neither a bundle nor a checkpoint nor a run" in capsys.readouterr().err


def test_verify_notices_a_machine_that_computes_otherwise(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from prime_jax.export import golden

    true = golden.onnxruntime_answers

    def moved(*given: Any) -> golden.Arrays:
        return {name: array + np.float32(0.01) for name, array in true(*given).items()}

    monkeypatch.setattr(golden, "onnxruntime_answers", moved)
    assert verification.main([str(copied), "--run-onnx"]) == 1
    assert "model.onnx: onnxruntime differs from the golden answers by 1.0e-02" in capsys.readouterr().err


def test_verify_does_not_run_code_of_a_stranger(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sealed anew after its code was changed; our own module stands in for it."""
    ran = copied.parent / "ran"
    runtime = copied / "torch_runtime.py"
    runtime.write_text(f"open({str(ran)!r}, 'w')\n{runtime.read_text()}")
    facts = {"onnx": read_json(copied / "manifest.json")["onnx"]}
    write_manifest(copied, "bundle", **facts)
    assert verification.main([str(copied), "--run-torch"]) == 0
    assert "of another version, not run without --public-key" in capsys.readouterr().out
    assert not ran.exists()


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("golden.safetensors", ["--run-onnx"], "not a safetensors file"),
        ("model.onnx", ["--run-onnx"], r"model\.onnx: cannot be run"),
        ("parity.json", ["--run-onnx"], "does not say how close fp16 was"),
        ("config.json", ["--run-torch"], "cannot be run"),
    ],
)
def test_verify_names_sealed_nonsense(
    copied: Path, capsys: pytest.CaptureFixture[str], name: str, words: list[str], message: str
) -> None:
    (copied / name).write_text("{}")
    write_manifest(copied, "bundle", onnx=read_json(copied / "manifest.json")["onnx"])
    assert verification.main([str(copied), *words]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_signature_holds_for_its_owner_and_content_only(copied: Path, keys: Path) -> None:
    verify_signature(copied, keys / "a.pub")
    with pytest.raises(CheckpointError, match=r"model\.sig: the signature does not hold"):
        verify_signature(copied, keys / "b.pub")
    for name in ("manifest.json", "torch_runtime.py"):
        whole = (copied / name).read_bytes()
        (copied / name).write_bytes(whole + b" ")
        with pytest.raises(CheckpointError, match="does not hold"):
            verify_signature(copied, keys / "a.pub")
        (copied / name).write_bytes(whole)
    (copied / "__pycache__").mkdir()
    with pytest.raises(CheckpointError, match="compiled code that nobody signed"):
        verify_signature(copied, keys / "a.pub")
    (copied / "__pycache__").rmdir()
    (copied / "stranger.py").write_text("")
    with pytest.raises(CheckpointError, match="does not hold"):
        verify_signature(copied, keys / "a.pub")
    (copied / "stranger.py").unlink()
    verify_signature(copied, keys / "a.pub")
    (copied / "model.sig").write_text("{}")
    with pytest.raises(CheckpointError, match="does not hold"):
        verify_signature(copied, keys / "a.pub")
    (copied / "model.sig").unlink()
    with pytest.raises(CheckpointError, match=r"is not signed, there is no model\.sig"):
        verify_signature(copied, keys / "a.pub")


def test_keys(copied: Path, keys: Path) -> None:
    sign(copied, keys / "b.pem", "secret")
    verify_signature(copied, keys / "b.pub")
    with pytest.raises(ExportError, match=r"b\.pem: cannot sign with this key"):
        sign(copied, keys / "b.pem", "wrong")
    with pytest.raises(ExportError, match="there is no such key file"):
        sign(copied, keys / "c.pem")
    with pytest.raises(ExportError, match="there is no such key file"):
        verify_signature(copied, keys / "c.pub")
    with pytest.raises(ExportError, match="not a public elliptic-curve key"):
        verify_signature(copied, keys / "a.pem")


def test_inspect_a_run_a_checkpoint_and_a_bundle(
    run: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = inspection.inspect(run)
    assert found["kind"] == "run"
    assert [row["newest"] for row in found["checkpoints"]][-1] is True
    assert sum(row["best"] for row in found["checkpoints"]) == 1
    assert found["training"]["num_epochs"] == 2
    assert found["facts"]["encoder"] == "bag-of-words"
    assert found["items"]["state"]["bytes"] > found["items"]["params"]["bytes"] > 100_000
    assert inspection.inspect(Path(found["folder"])) == {
        **{name: value for name, value in found.items() if name != "checkpoints"},
        "kind": "checkpoint",
    }
    assert inspection.main([str(exported), "--json"]) == 0
    described: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (described["kind"], described["signed"], described["training"]) == ("bundle", True, None)
    assert described["parameters"] == found["parameters"]
    for folder in (run, exported):
        assert inspection.main([str(folder)]) == 0
    shown = capsys.readouterr().out
    assert f"{found['parameters']:,} parameters" in shown
    assert "model.int8.onnx" in shown
    assert inspection.main([str(run.parent)]) == 2
    assert "neither a bundle nor a checkpoint nor a run" in capsys.readouterr().err


def test_the_triton_repository_serves_what_the_bundle_holds(exported: Path) -> None:
    models = exported.parent / "triton"
    assert sorted(one.name for one in models.iterdir()) == [
        "prime_predictor",
        "prime_predictor_fp16",
        "prime_predictor_int8",
    ]
    for name in ("", "_fp16", "_int8"):
        file = exported / f"model{name.replace('_', '.')}.onnx"
        assert (models / f"prime_predictor{name}" / "1" / "model.onnx").read_bytes() == file.read_bytes()


CHECK = """
import importlib.util, sys
from pathlib import Path
from google.protobuf import text_format
package = Path(importlib.util.find_spec("tritonclient").submodule_search_locations[0])
spec = importlib.util.spec_from_file_location("model_config_pb2", package / "grpc" / "model_config_pb2.py")
schema = importlib.util.module_from_spec(spec)
spec.loader.exec_module(schema)
given = text_format.Parse(Path(sys.argv[1]).read_text(), schema.ModelConfig())
for tensor in (*given.input, *given.output):
    print(tensor.name, schema.DataType.Name(tensor.data_type), list(tensor.dims))
print(given.name, given.backend, given.max_batch_size, list(given.dynamic_batching.preferred_batch_size))
"""


def test_the_triton_configuration_fits_tritons_published_schema(exported: Path) -> None:
    """The schema is the one that NVIDIA's own client was generated from."""
    if sys.executable == PYTHON and importlib.util.find_spec("tritonclient") is None:
        pytest.skip("tritonclient is not installed; 'make consumers' runs this")
    config = exported.parent / "triton" / "prime_predictor" / "config.pbtxt"
    done = subprocess.run([PYTHON, "-c", CHECK, str(config)], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [
        f"context TYPE_FP32 [4, {fakes.DIM}]",
        "context_mask TYPE_BOOL [4]",
        f"query TYPE_FP32 [{fakes.DIM}]",
        f"embedding TYPE_FP32 [{fakes.DIM}]",
        "prime_predictor onnxruntime 64 [8, 32]",
    ], done.stderr

"""What prime-jax wrote in format 2 loads, goes on and gives the numbers it gave then.

The archive holds, of a PRIME run with averaged weights, a hybrid run, a JASPER run, a run with trained
encoders and a text predictor: a run that was stopped half-way (`runs/`), the answers it gave at that moment
and those of the same run that was never stopped (`golden/`), and the latter's bundle (`bundles/`). It was
written on 2026-11-28 and stays as it is.
"""

import tarfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import prime_jax
from prime_jax.export.verification import verify
from prime_jax.files import read_json
from prime_jax.train import checkpoints
from prime_jax.train.__main__ import main as train

FIXTURE = Path(__file__).parents[1] / "fixtures" / "format_v2.tar.xz"
RUNS = ("prime", "hybrid", "jasper", "trained", "text")
BUNDLES = ("prime", "jasper", "trained", "text")
TEXTS = [["the cat sat", "rain fell"], []], ["dogs ran home", "a mat"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("format_2")
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(autouse=True)
def inside(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs name their data by relative paths."""
    monkeypatch.chdir(root)


def golden(kind: str) -> dict[str, np.ndarray]:
    return load_file(Path("golden") / f"{kind}.safetensors")


def answers(folder: Path, kind: str) -> np.ndarray:
    predictor, asked = prime_jax.load(folder, precision="float32"), golden(kind)
    if kind in ("text", "trained"):
        return predictor.predict_text(*TEXTS)
    if kind == "jasper":
        return predictor.steer(asked["question"], asked["steering"])
    return predictor.predict(asked["context"], asked["query"])


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_predicts_as_it_did(kind: str) -> None:
    np.testing.assert_allclose(
        answers(Path("runs") / kind, kind), golden(kind)["answers_when_stopped"], atol=2e-6
    )


@pytest.mark.parametrize("kind", BUNDLES)
def test_a_bundle_predicts_as_it_did(kind: str) -> None:
    bundle = Path("bundles") / kind
    assert read_json(bundle / "manifest.json")["format_version"] == 2
    np.testing.assert_allclose(answers(bundle, kind), golden(kind)["answers"], atol=2e-6)
    assert any("golden requests in onnxruntime" in line for line in verify(bundle, onnx=True))


@pytest.mark.parametrize("kind", RUNS)
def test_a_stopped_run_goes_on_to_where_it_would_have_come(kind: str) -> None:
    """Optimizer, averages, random numbers and what hybrid training knows are all read."""
    run = Path("runs") / kind
    stopped = checkpoints.latest(run)
    assert stopped is not None
    own_encoder = [] if kind in ("text", "trained") else ["--encoder", "fakes:encoder"]
    assert train(["--resume", *own_encoder, "--out", str(run)]) == 0
    ended = checkpoints.latest(run)
    assert ended is not None
    assert ended.step > stopped.step
    np.testing.assert_allclose(answers(ended.folder, kind), golden(kind)["answers"], atol=1e-4)

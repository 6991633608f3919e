"""What prime-jax 0.1.0 wrote, in format 1, loads and gives the numbers it gave then."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import prime_jax
from prime_jax.export import torch_runtime
from prime_jax.export.verification import verify
from prime_jax.files import read_json
from prime_jax.train import checkpoints

FIXTURE = Path(__file__).parents[1] / "fixtures" / "format_v1.tar.xz"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bundle/` and `run/`, of one model."""
    folder = tmp_path_factory.mktemp("format_1")
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("name", ["bundle", "run"])
def test_loads_and_predicts_as_it_did(written: Path, name: str) -> None:
    golden = load_file(written / "bundle" / "golden.safetensors")
    predictor = prime_jax.load(written / name, precision="float32")
    answers = predictor.predict(golden["context"], golden["query"], golden["context_mask"])
    np.testing.assert_allclose(answers, golden["embedding"], atol=1e-6)
    info = predictor.info()
    assert (info["format_version"], info["model_version"], info["step"]) == (2, "1.0.0", 4)


def test_is_really_of_format_1(written: Path) -> None:
    for manifest in written.rglob("manifest.json"):
        assert read_json(manifest)["format_version"] == 1


def test_the_torch_runtime_of_today_opens_it(written: Path) -> None:
    golden = load_file(written / "bundle" / "golden.safetensors")
    model = torch_runtime.load_bundle(written / "bundle")
    answers = model(*(torch.from_numpy(golden[name]) for name in ("context", "query", "context_mask")))
    np.testing.assert_allclose(answers.detach(), golden["embedding"], atol=1e-5)


def test_verifies_with_its_golden_answers(written: Path) -> None:
    lines = list(verify(written / "bundle", onnx=True, torch=True))
    assert lines[1].startswith("model.onnx: 4 golden requests in onnxruntime")
    assert "of another version, not run without --public-key" in lines[2]
    assert lines[3].startswith("torch_runtime.py: 4 golden requests in torch")
    hashed, restored = verify(written / "run")
    assert hashed.endswith("every SHA-256 as in manifest.json")
    assert restored.endswith("params, state restored")


def test_its_training_state_restores(written: Path) -> None:
    """Found by what it says of itself, with the state laid out as today's."""
    from prime_jax.train.optim import make_optimizer
    from prime_jax.train.state import init_state

    newest = checkpoints.latest(written / "run")
    assert newest is not None
    config = checkpoints.load_model(written / "run").config
    like = init_state(config.model, make_optimizer(config.train, 100), seed=0)
    state, _ = checkpoints.restore(newest, like)
    assert int(state.step) == 4

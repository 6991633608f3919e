"""Weights trained in PyTorch come back: every kind of file, equal numbers, nothing executed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from predictors import answers, make, requests
from safetensors.torch import save_file
from test_export_parity import in_torch

import prime_jax
from prime_jax.config import Config
from prime_jax.errors import CheckpointError, PredictorError
from prime_jax.export.__main__ import main
from prime_jax.export.bundle import write_bundle
from prime_jax.export.from_torch import from_torch
from prime_jax.export.torch_runtime import EmbeddingPredictor
from prime_jax.models.prime import PredictorConfig
from prime_jax.train.setup import starting_weights

FIELDS = {"residual": "copy", "context_attention": "causal", "use_torch_compile": False}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("from_torch") / "bundle"
    write_bundle(make(**FIELDS), folder, facts={"encoder": "minilm-0123", "query_prefix": "query: "})
    return folder


@pytest.fixture(scope="module")
def tuned() -> EmbeddingPredictor:
    """A module that PyTorch changed by some steps, every weight of it."""
    module = in_torch(make(**FIELDS)).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    torch.manual_seed(0)
    for _ in range(3):
        optimizer.zero_grad()
        context, query = torch.randn(6, 4, 24), torch.randn(6, 24)
        (module(context, query) * torch.randn(6, 24)).sum().backward()
        optimizer.step()
    return module.eval()


def same(model: object, tuned: EmbeddingPredictor) -> None:
    context, query, mask = requests(20)
    with torch.inference_mode():
        expected = tuned(*map(torch.from_numpy, (context, query, mask))).numpy()
    np.testing.assert_allclose(answers(model, context, query, mask), expected, atol=1e-5)


def test_a_state_dict_in_memory(tuned: EmbeddingPredictor) -> None:
    same(from_torch(tuned.state_dict(), make(**FIELDS).config), tuned)
    arrays = {name: tensor.numpy() for name, tensor in tuned.state_dict().items()}
    same(from_torch(arrays, make(**FIELDS).config.model_dump()), tuned)


def test_a_checkpoint_knows_its_config(tuned: EmbeddingPredictor, tmp_path: Path) -> None:
    tuned.save_checkpoint(tmp_path / "tuned.pt")
    same(from_torch(tmp_path / "tuned.pt"), tuned)


@pytest.mark.parametrize("name", ["tuned.pt", "tuned.pth", "tuned.safetensors"])
def test_a_file_of_weights_with_the_config_of_its_bundle(
    tuned: EmbeddingPredictor, bundle: Path, tmp_path: Path, name: str
) -> None:
    (save_file if name.endswith("safetensors") else torch.save)(tuned.state_dict(), tmp_path / name)
    same(from_torch(tmp_path / name, bundle / "config.json"), tuned)
    with pytest.raises(PredictorError, match=rf"{name}: holds no config"):
        from_torch(tmp_path / name)


def test_a_bundle(bundle: Path) -> None:
    same(from_torch(bundle), in_torch(make(**FIELDS)))


def test_a_config_that_would_compute_something_else_is_refused(
    tuned: EmbeddingPredictor, tmp_path: Path
) -> None:
    """The weights of two heads and of four have the same shapes."""
    tuned.save_checkpoint(tmp_path / "tuned.pt")
    same(from_torch(tmp_path / "tuned.pt", make(**FIELDS).config), tuned)
    other = make(**{**FIELDS, "context_attention": "full"}).config
    with pytest.raises(PredictorError, match=r"was saved with context_attention 'causal', .* says 'full'"):
        from_torch(tmp_path / "tuned.pt", other)


def test_a_checkpoint_in_half_precision(tuned: EmbeddingPredictor, tmp_path: Path) -> None:
    half = EmbeddingPredictor(tuned.config).bfloat16()
    half.load_state_dict(tuned.state_dict())
    half.save_checkpoint(tmp_path / "half.pt")
    same(from_torch(tmp_path / "half.pt"), half.float().eval())


def test_half_precision_becomes_float32(tuned: EmbeddingPredictor) -> None:
    rounded = {name: tensor.bfloat16() for name, tensor in tuned.state_dict().items()}
    module = in_torch(make(**FIELDS))
    module.load_state_dict(rounded)
    same(from_torch(rounded, tuned_config()), module.eval())


def tuned_config() -> object:
    return make(**FIELDS).config


def test_the_command_makes_a_bundle_that_training_can_start_from(
    tuned: EmbeddingPredictor, bundle: Path, tmp_path: Path
) -> None:
    torch.save(tuned.state_dict(), tmp_path / "tuned.pt")
    out = tmp_path / "again"
    assert main(["--torch", str(tmp_path / "tuned.pt"), "--like", str(bundle), "--out", str(out)]) == 0
    predictor = prime_jax.load(out)
    same(predictor.model, tuned)
    assert predictor.info()["encoder"] == "minilm-0123"
    model = PredictorConfig(**{**predictor.model.config.model_dump(), "checkpoint_path": str(out)})
    weights = starting_weights(Config(model=model))
    np.testing.assert_array_equal(weights["pred_token"], tuned.pred_token.detach()[0, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.bias": None}, r"state_dict: tensor 'norm\.bias' is missing"),
        ({"extra": torch.zeros(2)}, "tensor 'extra' is unexpected"),
        ({"norm.bias": torch.zeros(3)}, r"'norm\.bias' has shape \(3,\), expected \(128,\)"),
        ({"norm.bias": torch.full((128,), torch.nan)}, r"'norm\.bias' holds NaN or Inf"),
        ({"norm.bias": torch.zeros(128, dtype=torch.int64)}, r"'norm\.bias' has dtype int64"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    tuned: EmbeddingPredictor, change: dict[str, torch.Tensor | None], message: str
) -> None:
    tensors = {**tuned.state_dict(), **change}
    with pytest.raises(CheckpointError, match=message):
        from_torch({name: one for name, one in tensors.items() if one is not None}, tuned_config())


def test_files_that_are_no_weights_are_refused(bundle: Path, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"w": Code()}, tmp_path / "code.pt")
    with pytest.raises(CheckpointError, match=r"code\.pt: holds more than tensors"):
        from_torch(tmp_path / "code.pt", bundle / "config.json")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "cut.safetensors").write_bytes((bundle / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors: damaged"):
        from_torch(tmp_path / "cut.safetensors", bundle / "config.json")
    with pytest.raises(CheckpointError, match=r"none\.safetensors: the file is missing"):
        from_torch(tmp_path / "none.safetensors", bundle / "config.json")
    with pytest.raises(CheckpointError, match=r"expected a \.pt, \.pth or \.safetensors file"):
        from_torch(tmp_path / "model.bin")
    with pytest.raises(PredictorError, match=r"state_dict: model\.num_heads: "):
        from_torch({}, {"hidden_dim": 128, "num_heads": 0})
    with pytest.raises(PredictorError, match=r"state_dict: model: .*not divisible"):
        from_torch({}, {"hidden_dim": 129, "num_heads": 2})
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(PredictorError, match=r"empty\.json: has no section 'model'"):
        from_torch(bundle / "model.safetensors", tmp_path / "empty.json")
    torch.save({"w": "text"}, tmp_path / "text.pt")
    with pytest.raises(CheckpointError, match=r"text\.pt: holds other things than tensors"):
        from_torch(tmp_path / "text.pt", bundle / "config.json")

"""A predictor with Llama layers, handed over: one runtime file that stands alone, and the way back."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from predictors import LLAMA, answers, make, requests

import prime_jax
from prime_jax.errors import PredictorError
from prime_jax.export.bundle import write_bundle
from prime_jax.export.from_torch import from_torch
from prime_jax.export.verification import verify
from prime_jax.models.layers import InitFrom

MODEL = {**LLAMA, "residual": "copy", "context_attention": "causal", "use_torch_compile": False}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "bundle"
    model = make(**MODEL)
    model.config = model.config.model_copy(update={"init_from": InitFrom(path="somewhere", layers=(0, 2))})
    parity = write_bundle(model, folder, facts={})
    assert parity["onnxruntime"]["max_abs_difference"] <= 1e-5
    assert parity["torch"]["max_abs_difference"] <= 1e-5
    return folder


def test_its_weights_have_the_names_of_hugging_face(bundle: Path) -> None:
    from safetensors import safe_open

    with safe_open(bundle / "model.safetensors", framework="np") as tensors:
        names = set(tensors.keys())
    block = {"input_layernorm", "post_attention_layernorm", *(f"self_attn.{one}_proj" for one in "qkvo")}
    block |= {f"mlp.{one}_proj" for one in ("gate", "up", "down")}
    assert {f"layers.1.{name}.weight" for name in block} <= names
    assert "pos_embedding" not in names
    assert "norm.bias" not in names


def test_where_training_started_stays_behind(bundle: Path) -> None:
    model = json.loads((bundle / "config.json").read_text())["model"]
    assert "init_from" not in model
    assert (model["block"], model["num_kv_heads"], model["rope_scaling"]["factor"]) == ("llama", 2, 4.0)


def test_jax_and_verification_read_it(bundle: Path) -> None:
    inputs = requests(8)
    found = prime_jax.load(bundle, precision="float32").predict(np.nan_to_num(inputs[0]), *inputs[1:])
    np.testing.assert_allclose(found, answers(make(**MODEL), *inputs), atol=1e-5)
    told = list(verify(bundle, onnx=True, torch=True))
    assert not any("of another version" in line for line in told)


ALONE = """
import sys, torch
from torch_runtime import load_bundle
model = load_bundle(sys.argv[1])
torch.manual_seed(0)
for weight in model.parameters():
    weight.data += 0.01 * torch.randn_like(weight)
model.save_checkpoint(sys.argv[2])
assert not any(name.startswith("prime_jax") for name in sys.modules)
"""


def test_torch_alone_trains_it_and_jax_takes_it_back(bundle: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned.pt"
    subprocess.run(
        [sys.executable, "-P", "-c", ALONE, str(bundle), str(tuned)],
        env={"PYTHONPATH": str(bundle), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        timeout=120,
        check=True,
    )
    back = from_torch(tuned)
    before = make(**MODEL)
    left, right = back.layers[0].q_proj.kernel[...], before.layers[0].q_proj.kernel[...]
    assert 0.005 < float(np.abs(left - right).mean()) < 0.02
    again = from_torch(torch.load(tuned, weights_only=True)["state_dict"], back.config)
    np.testing.assert_array_equal(answers(back, *requests(3)), answers(again, *requests(3)))
    other = {**back.config.model_dump(), "rope_theta": 51.0}
    with pytest.raises(PredictorError, match=r"saved with rope_theta 50.0, the config given says 51.0"):
        from_torch(tuned, other)

"""Llama layers of a Hugging Face folder in a predictor: equal to transformers, and what a bad folder says."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llama
import torch
from flax import nnx
from safetensors.torch import load_file, save_file

from prime_jax.errors import ConfigError, DataError
from prime_jax.models.prime import EmbeddingPredictor, PredictorConfig
from prime_jax.nn.rotary import RopeScaling, frequencies, rotary_table
from prime_jax.pretrained.llama import pretrained_layers, read_llama_config


def settings(folder: Path, first: int, end: int, **fields: Any) -> PredictorConfig:
    known = tiny_llama.SETTINGS | {"input_dim": 8, "output_dim": 8, "num_layers": end - first}
    return PredictorConfig(**(known | {"init_from": {"path": str(folder), "layers": (first, end)}} | fields))


def loaded(config: PredictorConfig) -> EmbeddingPredictor:
    model = config.build(rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for place, tensor in pretrained_layers(config):
        below = params
        for part in place[:-1]:
            below = below[part]
        assert below[place[-1]].shape == tensor.shape
        below[place[-1]] = jnp.asarray(tensor)
    return nnx.merge(nnx.split(model)[0], params)


def assert_layers_equal(ours: EmbeddingPredictor, theirs: Any, first: int, tokens: int = 24) -> None:
    """Each layer alone, under a causal mask, on what the layer before gave in transformers."""
    config = ours.config
    torch.manual_seed(1)
    entering = torch.randn(2, tokens, config.hidden_dim)
    with torch.inference_mode():
        states = theirs(inputs_embeds=entering, output_hidden_states=True).hidden_states
    table = rotary_table(tokens, config.head_size, config.rope_theta, config.rope_scaling)
    rotation = table.at(jnp.broadcast_to(jnp.arange(tokens), (2, tokens)))
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((tokens, tokens), bool)), (2, tokens, tokens))
    for index, layer in enumerate(ours.layers):
        given, expected = (jnp.asarray(states[first + index + more].numpy()) for more in (0, 1))
        answer = layer(given, causal, rotation)
        if first + index + 1 == theirs.config.num_hidden_layers:  # transformers norms its last state
            answer = ours.norm(answer)
        np.testing.assert_allclose(answer, expected, atol=1e-4)
        np.testing.assert_allclose(
            layer(given, causal, rotation, rows=1)[:, 0], layer(given, causal, rotation)[:, 0], atol=1e-5
        )


@pytest.fixture(scope="module")
def theirs() -> Any:
    return tiny_llama.llama()


@pytest.fixture(scope="module")
def folder(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write(tmp_path_factory.mktemp("llama") / "tiny", theirs)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "tiny"))


@pytest.mark.parametrize(("first", "end"), [(0, 3), (1, 2)])
def test_every_layer_equals_transformers(folder: Path, theirs: Any, first: int, end: int) -> None:
    assert_layers_equal(loaded(settings(folder, first, end)), theirs, first)


def test_shards_and_half_precision(theirs: Any, folder: Path, tmp_path: Path) -> None:
    tiny_llama.write(tmp_path, tiny_llama.llama().to(torch.bfloat16), max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    halved = tiny_llama.llama()
    with torch.no_grad():
        for weight in halved.parameters():
            weight.copy_(weight.bfloat16().float())
    assert_layers_equal(loaded(settings(tmp_path, 0, 3)), halved, 0)


def test_the_final_norm_comes_along_only_behind_the_last_layer(folder: Path, theirs: Any) -> None:
    with_norm, without = loaded(settings(folder, 2, 3)), loaded(settings(folder, 0, 2))
    np.testing.assert_array_equal(with_norm.norm.scale[...], theirs.norm.weight.detach().numpy())
    np.testing.assert_array_equal(without.norm.scale[...], np.ones(tiny_llama.HIDDEN))


def test_the_shapes_of_llama_3_2_1b(tmp_path: Path) -> None:
    """Its config.json but for depth and vocabulary: 2048 wide, 32 heads on 8, rotary scaling 32."""
    rope = {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "head_dim": 64}
    sizes |= {"num_key_value_heads": 8, "num_hidden_layers": 1, "max_position_embeddings": 131072}
    theirs = tiny_llama.llama(**sizes, rope_parameters=rope)
    tiny_llama.write(tmp_path, theirs)
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    config = PredictorConfig(
        hidden_dim=2048,
        num_layers=1,
        num_heads=32,
        block="llama",
        num_kv_heads=8,
        head_dim=64,
        mlp_dim=8192,
        rope_theta=500000.0,
        rope_scaling=scaling,
        init_from={"path": str(tmp_path), "layers": (0, 1)},
    )
    assert_layers_equal(loaded(config), theirs, 0, tokens=8)


def test_scaling_of_frequencies_by_hand() -> None:
    """theta 16, 4 pairs: 1, 1/2, 1/4, 1/8 radians. Of 8 pi positions these make 4, 2, 1 and 0.5 waves.

    With low 0.5 and high 4 the first stays, the last becomes a quarter, those between are mixed linearly.
    """
    scaling = RopeScaling(
        factor=4, low_freq_factor=0.5, high_freq_factor=4, original_max_position_embeddings=25
    )
    waves = 25 * np.array([1, 0.5, 0.25, 0.125]) / (2 * np.pi)
    kept = np.clip((waves - 0.5) / 3.5, 0, 1)
    expected = np.array([1, 0.5, 0.25, 0.125]) * (kept + (1 - kept) / 4)
    np.testing.assert_allclose(frequencies(8, 16.0, scaling), expected)
    np.testing.assert_allclose(frequencies(8, 16.0, None), [1, 0.5, 0.25, 0.125])


def test_both_ways_of_writing_rope_are_read(copy: Path) -> None:
    newer = read_llama_config(copy)
    fields = json.loads((copy / "config.json").read_text())
    rope = fields.pop("rope_parameters")
    fields |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (copy / "config.json").write_text(json.dumps(fields))
    assert read_llama_config(copy) == newer
    assert newer.rope_scaling == RopeScaling(**tiny_llama.SCALING)


def _rewritten(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


class TestBadFolders:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda t: t.pop("layers.1.mlp.up_proj.weight"),
                r"model.safetensors: tensor 'layers.1.mlp.up_proj.weight' is missing",
            ),
            (
                lambda t: t.update({"layers.1.self_attn.k_proj.weight": torch.zeros(8, 128)}),
                r"tensor 'layers.1.self_attn.k_proj.weight' has shape .8, 128., expected .32",
            ),
            (
                lambda t: t.update({"layers.1.input_layernorm.weight": torch.zeros(128, dtype=torch.int32)}),
                "model.safetensors: tensor 'layers.1.input_layernorm.weight' has dtype I32",
            ),
            (
                lambda t: t.update({"layers.1.self_attn.q_proj.bias": torch.zeros(64)}),
                "tensor 'layers.1.self_attn.q_proj.bias' has no place in a Llama layer",
            ),
        ],
    )
    def test_a_wrong_tensor_is_named_with_its_file(self, copy: Path, change: Any, message: str) -> None:
        _rewritten(copy, change)
        with pytest.raises(DataError, match=message):
            list(pretrained_layers(settings(copy, 1, 2)))

    def test_a_wrong_tensor_of_other_layers_does_not_matter(self, copy: Path) -> None:
        _rewritten(copy, lambda t: t.pop("layers.2.mlp.up_proj.weight"))
        assert len(list(pretrained_layers(settings(copy, 0, 2)))) == 2 * 9

    def test_a_truncated_file(self, copy: Path) -> None:
        whole = (copy / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(whole[:-100])
        with pytest.raises(DataError, match=r"model.safetensors: not a readable safetensors file"):
            list(pretrained_layers(settings(copy, 0, 2)))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"model_type": "qwen2"}, "config.json: not a Llama this library can run .model_type"),
            ({"hidden_act": "gelu"}, "hidden_act"),
            ({"attention_bias": True}, "attention_bias"),
            ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling.rope_type"),
        ],
    )
    def test_a_config_of_another_model(self, copy: Path, fields: dict[str, Any], message: str) -> None:
        known = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(known | fields))
        with pytest.raises(DataError, match=message):
            list(pretrained_layers(settings(copy, 0, 1)))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"num_kv_heads": 4}, "model.num_kv_heads is 4, but the layers of .* were made with 2"),
            ({"rope_theta": 10000.0}, r"model.rope_theta is 10000.0, .* set model.rope_theta: 500.0"),
            ({"mlp_dim": None}, "model.mlp_dim is 512, .* with 96"),
        ],
    )
    def test_settings_that_do_not_fit(self, folder: Path, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            list(pretrained_layers(settings(folder, 0, 1, **fields)))

    def test_layers_that_are_not_there(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"has the layers 0 to 2"):
            list(pretrained_layers(settings(folder, 2, 4)))
        with pytest.raises(ConfigError, match="there is no such folder"):
            list(pretrained_layers(settings(tmp_path / "none", 0, 1)))


MEMORY = """
import sys
from prime_jax.models.prime import PredictorConfig
from prime_jax.pretrained.llama import pretrained_layers
def peak(): return 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
config = PredictorConfig(hidden_dim=512, num_layers=8, num_heads=8, block="llama", mlp_dim=2048,
                         init_from={"path": sys.argv[1], "layers": (0, 8)})
before = peak()
kept = [tensor for _, tensor in pretrained_layers(config)]
print((peak() - before) / sum(tensor.nbytes for tensor in kept))
"""


def test_loading_takes_less_than_a_third_more_memory_than_the_weights(tmp_path: Path) -> None:
    """134 MB in float32, and a file as large: neither a second copy nor the file stays in memory."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "head_dim": 64}
    sizes |= {
        "num_key_value_heads": 8,
        "num_hidden_layers": 8,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }
    tiny_llama.write(tmp_path, tiny_llama.llama(**sizes))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
    )
    assert 0.9 < float(done.stdout) < 1.3

"""How the transformer layers are trained: pretrained at first, slower, frozen, or by low-rank updates."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llama
from steps import DIM, run

import prime_jax
from prime_jax.config import Config, TrainingConfig, read_config
from prime_jax.errors import ConfigError
from prime_jax.models.prime import PredictorConfig
from prime_jax.pretrained.llama import pretrained_layers
from prime_jax.train.__main__ import main
from prime_jax.train.adapters import initial_adapters, with_adapters
from prime_jax.train.optim import make_optimizer
from prime_jax.train.state import MODEL
from prime_jax.train.step import StepPlan


def moved(config: TrainingConfig, layers: int = 3) -> dict[str, Any]:
    """What the first update does where every gradient is 1: Adam moves everything by the learning rate."""
    params = {MODEL: {"layers": {i: {"w": jnp.ones(2)} for i in range(layers)}, "head": jnp.ones(2)}}
    optimizer = make_optimizer(config, 1000)
    updates, state = optimizer.update(params, optimizer.init(params), params)
    updates["moments"] = sum(leaf.size for leaf in jax.tree.leaves(state))
    return updates


def test_lower_layers_move_less() -> None:
    plain = {"learning_rate": 0.1, "weight_decay": 0.0, "warmup_steps": 0, "gradient_clip_val": 0.0}
    found = moved(TrainingConfig(**plain, layers_lr_multiplier=0.5, layer_decay=0.1))[MODEL]
    np.testing.assert_allclose(found["head"], -0.1, rtol=1e-5)
    for layer, expected in enumerate((-0.0005, -0.005, -0.05)):
        np.testing.assert_allclose(found["layers"][layer]["w"], expected, rtol=1e-5)


def test_frozen_layers_do_not_move_and_have_no_moments() -> None:
    frozen = moved(TrainingConfig(layers_lr_multiplier=0.0, warmup_steps=0))
    assert not np.any(jax.tree.leaves(frozen[MODEL]["layers"]))
    assert np.all(frozen[MODEL]["head"] != 0)
    assert moved(TrainingConfig())["moments"] - frozen["moments"] == 2 * 3 * 2  # two of every number


def test_adapters_change_nothing_at_first_and_then_by_their_product() -> None:
    params = {"layers": {0: {"q": {"kernel": jnp.ones((3, 2))}, "norm": {"scale": jnp.ones(3)}}}}
    low = initial_adapters(jax.random.key(0), params, 1)
    assert jax.tree.map(jnp.shape, low) == {0: {"q": {"kernel": {"a": (3, 1), "b": (1, 2)}}}}
    np.testing.assert_array_equal(with_adapters(params, low)["layers"][0]["q"]["kernel"], 1)
    low[0]["q"]["kernel"] = {"a": jnp.array([[1.0], [2.0], [0.0]]), "b": jnp.array([[1.0, 10.0]])}
    changed = with_adapters(params, low)["layers"][0]
    np.testing.assert_array_equal(changed["q"]["kernel"], [[2, 11], [3, 21], [1, 1]])
    np.testing.assert_array_equal(changed["norm"]["scale"], 1)


@pytest.mark.parametrize("micro_batch", [0, 4])
def test_a_frozen_layer_gets_no_gradient(micro_batch: int) -> None:
    """Plain gradient descent without the optimizer's help."""
    before, _ = run(0)
    after, _ = run(1, plan=StepPlan(10, layers_frozen=True, micro_batch=micro_batch))
    for left, right in zip(
        *(jax.tree.leaves(s.params[MODEL]["layers"]) for s in (before, after)), strict=True
    ):
        np.testing.assert_array_equal(left, right)
    assert np.any(before.params[MODEL]["query_proj"]["kernel"] != after.params[MODEL]["query_proj"]["kernel"])
    assert before.params[MODEL]["query_proj"]["kernel"].shape[0] == DIM


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write(tmp_path_factory.mktemp("llama") / "tiny", tiny_llama.llama())


@pytest.fixture
def options(settings: list[str], folder: Path) -> list[str]:
    llama = [f"--model.{name.replace('_', '-')}={value}" for name, value in tiny_llama.SETTINGS.items()]
    llama = [word.replace("'", '"') for word in llama]
    start = f'{{"path": "{folder}", "layers": [1, 3]}}'
    plain = ["--model.use-torch-compile", "false"]  # nothing here predicts
    return [*settings, *llama, *plain, "--model.num-layers", "2", "--model.init-from", start]


def test_a_run_that_starts_from_pretrained_layers(options: list[str], tmp_path: Path) -> None:
    """The layers stay the folder's to the bit where there are no adapters; matrices that have them moved."""
    run = tmp_path / "run"
    words = [*options, "--train.lora-rank", "2", "--train.params-dtype", "float32"]
    assert main([*words, "--out", str(run)]) == 0
    model = prime_jax.load(run, precision="float32").model
    config = read_config(None, words).model
    assert isinstance(config, PredictorConfig)
    for place, tensor in pretrained_layers(config):
        found: Any = model
        for part in place:
            found = found[part] if isinstance(part, int) else getattr(found, part)
        adapted = np.abs(found[...] - tensor)
        if place[0] == "layers":
            assert (adapted.max() == 0) == (place[-1] == "scale"), place
        assert adapted.max() < 0.1 * np.abs(tensor).max()


def test_a_folder_of_other_sizes_is_refused(options: list[str], tmp_path: Path, capsys: Any) -> None:
    assert main([*options, "--model.mlp-dim", "64", "--out", str(tmp_path)]) == 2
    assert "model.mlp_dim is 64, but the layers of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": {"num_kv_heads": 2}}, "num_kv_heads belongs to llama layers, but block is 'gelu'"),
        ({"model": {"block": "llama", "num_kv_heads": 3}}, "num_kv_heads 3 does not divide num_heads 8"),
        ({"model": {"block": "llama", "head_dim": 33}}, "head_dim 33 is odd"),
        (
            {"model": {"block": "llama", "init_from": {"path": "x", "layers": [8, 16]}}},
            r"init_from.layers \[8, 16\] are 8 layers, but num_layers is 4",
        ),
        ({"model": {"block": "llama", "init_from": {"path": "x", "layers": [2, 2]}}}, "no run of layers"),
        ({"train": {"lora_rank": 2, "layer_decay": 0.9}}, "lora_rank freezes the layers"),
    ],
)
def test_settings_that_contradict_each_other(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.model_validate(fields)


def test_frozen_layers_do_not_go_with_a_steered_model() -> None:
    with pytest.raises(ConfigError, match="needs 0"):
        read_config(None, ["--model.kind", "jasper", "--train.lora-rank", "2"])

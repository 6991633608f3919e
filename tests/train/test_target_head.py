"""Targets that move: the head is validated, evaluated, exported and loaded with the model it belongs to."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import prime_jax
from prime_jax.data.store import EmbeddingStore
from prime_jax.errors import ConfigError
from prime_jax.evaluate.run import evaluate_run
from prime_jax.export.__main__ import main as export
from prime_jax.nn.target_head import map_memory
from prime_jax.retrieval.topk import search
from prime_jax.train import checkpoints
from prime_jax.train.__main__ import main

# Programs are compiled when they are needed, not all of them in every load.
LAZY = ["--model.use-torch-compile", "false"]


@pytest.mark.parametrize("target", ["slow", "ema"])
def test_from_training_to_a_bundle(
    target: str, settings: list[str], data_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = ["--train.target", target, "--train.y-encoder-lr-multiplier", "1.0", "--train.num-epochs", "4"]
    options += ["--train.ema-start", "0.5", "--train.ema-end", "0.6", "--model.residual", "query"]
    assert main([*settings, *LAZY, *options, "--out", str(run)]) == 0
    predictor = prime_jax.load(run, precision="float32")
    head = predictor.target_head
    assert head is not None
    assert np.abs(head).max() > 1e-3
    newest = checkpoints.latest(run)
    assert newest is not None

    rng = np.random.default_rng(0)
    memory = rng.normal(size=(5, 24)).astype(np.float32)
    memory /= np.linalg.norm(memory, axis=1, keepdims=True)
    mapped = predictor.map_memory(memory)
    expected = memory + memory @ np.asarray(head)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(mapped, expected, atol=1e-6)

    # The evaluation searches the mapped memory: its dev figure is that of training.
    report = evaluate_run(run, data_folder, "dev", tmp_path / "report", encoder="fakes:encoder")
    best = checkpoints.best(run)
    assert report["methods"]["predicted"]["MRR@10"] == pytest.approx(best.score, abs=1e-3)

    bundle = tmp_path / "bundle"
    assert export(["--encoder", "fakes:encoder", "--run", str(run), "--out", str(bundle)]) == 0
    assert "The memory must be mapped first" in (bundle / "MODEL_CARD.md").read_text()
    loaded = prime_jax.load(bundle, precision="float32")
    np.testing.assert_array_equal(loaded.map_memory(memory), mapped)


def test_frozen_targets_need_no_map(settings: list[str], tmp_path: Path) -> None:
    assert main([*settings, *LAZY, "--out", str(tmp_path)]) == 0
    predictor = prime_jax.load(tmp_path, precision="float32")
    memory = jnp.ones((2, 24))
    assert predictor.target_head is None
    assert predictor.map_memory(np.asarray(memory)).tolist() == memory.tolist()


@pytest.mark.parametrize("option", [("--train.target", "slow"), ("--train.projection-dim", "8")])
def test_what_moves_cannot_be_compared_with_the_frozen_corpus(
    option: tuple[str, str], settings: list[str]
) -> None:
    from prime_jax.config import read_config

    with pytest.raises(ConfigError, match="use negatives 'batch'"):
        read_config(None, [*settings, "--train.negatives", "corpus", *option])


def test_a_memory_that_is_read_in_parts_is_mapped_in_parts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(9, 4)).astype(np.float32)
    store = EmbeddingStore.open(tmp_path, "e", 4)
    store.add([str(row) for row in range(9)], vectors)
    kernel = jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)
    whole, parts = map_memory(kernel, vectors), map_memory(kernel, store.part(np.arange(9)))
    assert (parts.shape, len(parts), parts.dtype) == ((9, 4), 9, np.float32)
    np.testing.assert_allclose(parts[2:5], whole[2:5], rtol=1e-6)
    np.testing.assert_allclose(parts[[7, 1]], whole[[7, 1]], rtol=1e-6)
    for one, other in zip(search(vectors, parts, 3), search(vectors, whole, 3), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)

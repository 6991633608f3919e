"""TF32, bfloat16 and fused attention of text encoders: what is computed, and how near it is to float32."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_bert

from prime_jax.config import Config
from prime_jax.nn.attention import attend
from prime_jax.nn.encoder_products import fused_attention, has_fused_attention
from prime_jax.predict.text import encoder_of
from prime_jax.pretrained.bert import BertTextEncoder
from prime_jax.pretrained.pair import load_pair

TEXTS = ["the cat sat on a mat", "", "rain", " ".join(["quiet hills and dogs ran home"] * 9)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert.write_folder(tmp_path_factory.mktemp("model") / "tiny", tiny_bert.tensors())


@pytest.fixture(scope="module")
def exact(folder: Path) -> np.ndarray:
    return BertTextEncoder(folder).encode(TEXTS)


@pytest.fixture(autouse=True)
def short_texts_are_fused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prime_jax.nn.bert.FUSED_FROM", 16)


def products(encoder: BertTextEncoder) -> set[tuple[str, ...]]:
    """Precision and dtype of the factors of every matrix product of the program for a GPU."""
    batch = np.zeros((2, 16), np.int32), np.full(2, 5, np.int32)
    weights = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), encoder._weights)
    text = encoder._embed.trace(weights, *batch).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("dot_general") == 2 * 6  # of each layer
    kinds = r"precision = \[(\w+), (\w+)\] : \(tensor<[\dx]+x(\w+)>, tensor<[\dx]+x(\w+)>\)"
    return set(re.findall(kinds, text))


def test_float32_is_what_it_was(folder: Path, exact: np.ndarray) -> None:
    named, plain = BertTextEncoder(folder, precision="float32"), BertTextEncoder(folder)
    assert named.identity == plain.identity
    np.testing.assert_array_equal(named.encode(TEXTS), exact)
    assert products(named) == {("HIGHEST", "HIGHEST", "f32", "f32")}


def test_tf32_leaves_the_rounding_to_the_device(folder: Path, exact: np.ndarray) -> None:
    """To a CPU, which has none, it is float32."""
    encoder = BertTextEncoder(folder, precision="tf32")
    assert products(encoder) == {("DEFAULT", "DEFAULT", "f32", "f32")}
    np.testing.assert_array_equal(encoder.encode(TEXTS), exact)


@pytest.mark.parametrize("fused", [False, True])
def test_bfloat16_is_near(folder: Path, exact: np.ndarray, fused: bool) -> None:
    encoder = BertTextEncoder(folder, precision="bfloat16", fused=fused)
    found = encoder.encode(TEXTS)
    assert (found * exact).sum(axis=1).min() >= 0.999
    assert np.abs(found - exact).max() > 1e-4  # it is another precision
    assert {kind[2:] for kind in products(encoder)} == {("bf16", "bf16")}
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"precision": "bfloat16"}])
def test_an_embedding_does_not_depend_on_its_batch_when_attention_is_fused(
    folder: Path, settings: dict[str, Any]
) -> None:
    """Neither on its neighbours nor on how far it is padded."""
    encoder = BertTextEncoder(folder, fused=True, **settings)
    together = encoder.encode(TEXTS)
    np.testing.assert_allclose(
        together,
        np.concatenate([encoder.encode([text]) for text in TEXTS]),
        atol=1e-6 if not settings else 5e-6,  # float32 sums in another order may round to another bfloat16
    )


def test_the_identity_tells_the_precision(folder: Path) -> None:
    kinds = ("float32", "tf32", "bfloat16")
    plain, tf32, halves = (BertTextEncoder(folder, precision=kind).identity for kind in kinds)
    assert re.fullmatch(r"tiny-mean-64-[0-9a-f]{8}", plain)
    assert re.fullmatch(r"tiny-mean-64-tf32-[0-9a-f]{8}", tf32)
    assert re.fullmatch(r"tiny-mean-64-bfloat16-[0-9a-f]{8}", halves)
    assert len({identity[-8:] for identity in (plain, tf32, halves)}) == 3


def test_a_run_and_a_pair_take_the_precision_along(folder: Path, tmp_path: Path) -> None:
    config = Config.model_validate({"data": {"encoder": str(folder), "encoder_precision": "bfloat16"}})
    predictor: Any = SimpleNamespace(config=config, info=dict, text_encoder=None)
    assert "-bfloat16-" in encoder_of(predictor).identity
    for name in ("x", "y"):
        tiny_bert.write_folder(tmp_path / name, tiny_bert.tensors())
    halves = load_pair(tmp_path, "bfloat16")
    assert "-bfloat16-" in halves.x.identity
    assert halves.identity != load_pair(tmp_path).identity


def test_fused_attention_equals_the_plain_one() -> None:
    """Of real tokens; rows that only fill a batch (length 0) must stay numbers."""
    rng = np.random.default_rng(0)
    queries, keys, values = (jnp.asarray(rng.normal(size=(3, 6, 2, 4)), jnp.float32) for _ in range(3))
    lengths = jnp.asarray([6, 2, 0])
    mask = jnp.broadcast_to((jnp.arange(6) < lengths[:, None])[:, None, :], (3, 6, 6))
    fused = fused_attention(queries, keys, values, lengths, jnp.float32)
    plain = attend(queries, keys, values, mask, jnp.float32)
    np.testing.assert_allclose(fused[:2], plain[:2], atol=1e-6)
    assert np.isfinite(fused).all()


def test_a_kernel_that_is_not_there_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_fused_attention(2, 8)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # without cuDNN: trying it fails
    assert not has_fused_attention(2, 16)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "near"), [("tf32", 0.9999), ("bfloat16", 0.999)])
def test_on_a_gpu(folder: Path, exact: np.ndarray, precision: Any, near: float) -> None:
    """With cuDNN's attention where it is there; padded, and alone."""
    encoder = BertTextEncoder(folder, precision=precision)
    found = encoder.encode(TEXTS)
    assert (found * exact).sum(axis=1).min() >= near
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    assert (found * alone).sum(axis=1).min() >= near

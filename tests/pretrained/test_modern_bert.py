"""ModernBERT, through the door of BERT: equal to transformers, trained and exported like the others."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_bert
import torch
from transformers import ModernBertConfig, ModernBertModel

from prime_jax.config import TrainingConfig
from prime_jax.errors import DataError
from prime_jax.export.text import write_encoder_onnx
from prime_jax.pretrained.bert import BertTextEncoder
from prime_jax.pretrained.families import read_encoder_config
from prime_jax.pretrained.writing import write_encoder
from prime_jax.train.encoders import X, encoder_plan, initial_encoders
from prime_jax.types import Batch, BatchTexts, Texts

TEXTS = ["the cat sat on a mat", "", "rain", " ".join(["quiet hills and dogs ran home"] * 4)]  # 26 tokens


@pytest.fixture(scope="module")
def theirs() -> Any:
    """Four layers, the first and the last of which see everything, the others 4 tokens to either side."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
    sizes |= {"max_position_embeddings": 40, "local_attention": 8, "pad_token_id": 0}
    sizes |= {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    vocabulary = len(tiny_bert.VOCABULARY)
    config = ModernBertConfig(vocab_size=vocabulary, attn_implementation="eager", **sizes)
    model = ModernBertModel(config).eval()
    for weight in model.parameters():
        with torch.no_grad():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


@pytest.fixture(scope="module")
def folder(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("modern") / "model"
    theirs.save_pretrained(folder)
    tiny_bert.write_tokenizer(folder / "tokenizer.json", tiny_bert.VOCABULARY)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return folder


def test_equal_to_transformers(folder: Path, theirs: Any, tmp_path: Path) -> None:
    encoder = BertTextEncoder(folder)
    found = encoder.encode(TEXTS)
    for row, text in enumerate(TEXTS):
        ids = torch.tensor([tiny_bert.token_ids(text, encoder.max_length)])
        with torch.inference_mode():
            hidden = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden.mean(dim=0), dim=0)
        np.testing.assert_allclose(found[row], expected.numpy(), atol=1e-5)
    write_encoder(encoder, tmp_path / "again")
    np.testing.assert_array_equal(BertTextEncoder(tmp_path / "again").encode(TEXTS), found)


def test_onnx_and_a_gradient(folder: Path, tmp_path: Path) -> None:
    """What bundles and training need of an encoder, in one pass each."""
    encoder = BertTextEncoder(folder)
    assert write_encoder_onnx(encoder, tmp_path / "model.onnx") < 1e-5
    settings = TrainingConfig(x_encoder="trained", mixed_precision=False)
    plan, params = encoder_plan(encoder, settings), initial_encoders(encoder, settings)
    ids = jnp.asarray([[tiny_bert.token_ids(TEXTS[0])] * 2], jnp.int32)
    texts = Texts(ids, jnp.full((1, 2), ids.shape[-1]))
    given = jnp.zeros((1, 1, 32)), jnp.ones((1, 1), bool), jnp.zeros((1, 32)), jnp.zeros((1, 32))
    one = jnp.zeros(1, jnp.int32)
    batch = Batch(
        *given, one, one[:, None], one, texts=BatchTexts(texts, Texts(ids[:, 0], texts.lengths[:, 0]))
    )
    np.testing.assert_allclose(
        plan.read(params, plan.inputs_of(batch))[1][0], encoder.encode(TEXTS[:1])[0], atol=1e-5
    )
    slope = jax.jit(jax.grad(lambda params: plan.read(params, plan.inputs_of(batch))[1][0, 0]))
    gradient = slope(params)[X]
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["layers"]))


def test_fused_attention_and_tf32_compute_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused where a layer sees the whole text, and where its window holds all of a short one."""
    monkeypatch.setattr("prime_jax.nn.modern_bert.FUSED_FROM", 4)
    plain = BertTextEncoder(folder).encode(TEXTS)
    np.testing.assert_allclose(BertTextEncoder(folder, fused=True).encode(TEXTS), plain, atol=1e-6)
    np.testing.assert_array_equal(BertTextEncoder(folder, precision="tf32").encode(TEXTS), plain)
    halves = BertTextEncoder(folder, precision="bfloat16", fused=True).encode(TEXTS)
    assert (halves * plain).sum(axis=1).min() >= 0.999


def test_the_config_of_transformers_4(folder: Path, tmp_path: Path) -> None:
    """Which layers see everything as a period, and the two bases by themselves."""
    newer = read_encoder_config(folder)
    fields = json.loads((folder / "config.json").read_text())
    fields.pop("layer_types"), fields.pop("rope_parameters")
    older = fields | {
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 160000.0,
        "local_rope_theta": 10000.0,
    }
    (tmp_path / "config.json").write_text(json.dumps(older))
    assert read_encoder_config(tmp_path) == newer


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_activation", "relu"), ("norm_bias", True), ("layer_types", ["full_attention"])],
)
def test_a_variant_that_is_not_computed(folder: Path, tmp_path: Path, field: str, value: Any) -> None:
    fields = json.loads((folder / "config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(DataError, match=rf"config.json: not a ModernBERT this library can run .*{field}"):
        read_encoder_config(tmp_path)

"""Text predictors of every family in every runtime; names and errors of their weights."""

import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_bert
import torch
from test_text_bundle import CONTEXTS, QUERIES, onnx
from tiny_text import text_config, text_model
from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertModel

import prime_jax
from prime_jax.errors import CheckpointError, ExportError
from prime_jax.export import torch_text
from prime_jax.export.bundle import write_bundle
from prime_jax.export.golden import module_of
from prime_jax.export.quantize import quantize
from prime_jax.export.to_onnx import to_onnx
from prime_jax.export.to_torch import load_state_dict, state_dict
from prime_jax.models.text import TextConfig, TextPredictor

FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"pooling": "cls", "roles": False, "query_weight": 2.0},
    "roberta": {"roles": False, "separate_turns": False},
    "modernbert": {"max_context_length": 3, "query_weight": 0.5},
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def model_of(family: str) -> TextPredictor:
    fields = text_config("modernbert" if family == "modernbert" else "bert").model_dump()
    changed: dict[str, dict[str, Any]] = {
        "bert": {},
        "roberta": {"model_type": "roberta", "pad_token_id": 0},
        "modernbert": {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]},
    }
    encoder = fields["encoder"] | changed[family]
    return text_model(TextConfig.model_validate(fields | FAMILIES[family] | {"encoder": encoder}))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    tiny_bert.write_tokenizer(tmp_path / "tokenizer.json", tiny_bert.VOCABULARY)
    return tmp_path


def test_no_bundle_without_its_tokenizer(tokenizer: Path) -> None:
    model, out = text_model(text_config()), tokenizer / "bundle"
    with pytest.raises(ExportError, match=r"a text model is exported with its tokenizer\.json: name its"):
        write_bundle(model, out, facts={})
    with pytest.raises(ExportError, match=r"tokenizer\.json: the file is missing"):
        write_bundle(model, out, facts={}, source=tokenizer / "nowhere")
    with pytest.raises(ExportError, match="separates texts by token 3, the model was trained with 4"):
        write_bundle(text_model(text_config(separator_id=4)), out, facts={}, source=tokenizer)
    tiny_bert.write_tokenizer(tokenizer / "tokenizer.json", [*tiny_bert.VOCABULARY, "more"])
    with pytest.raises(ExportError, match="knows 24 tokens, the model 23"):
        write_bundle(model, out, facts={}, source=tokenizer)
    assert not out.exists()


def test_every_family_and_choice(family: str, tokenizer: Path) -> None:
    """[CLS] pooling, no roles, no separators, other positions, rotations and windows; integers as well."""
    model, out = model_of(family), tokenizer / "bundle"
    parity = write_bundle(model, out, facts={}, source=tokenizer)
    for name in ("onnxruntime", "torch"):
        assert parity[name]["max_abs_difference"] < 1e-5
    read = [turns[len(turns) - min(len(turns), model.config.max_context_length) :] for turns in CONTEXTS]
    expected = prime_jax.load(out).predict_text(read, QUERIES)
    runtime = module_of((out / "torch_runtime.py").read_text(), "torch_runtime.py")
    ids, mask = runtime.load_tokenizer(out)(CONTEXTS, QUERIES)
    with torch.inference_mode():
        np.testing.assert_allclose(runtime.load_bundle(out)(ids, mask), expected, atol=1e-5)
    np.testing.assert_allclose(onnx(out, ids.numpy(), mask.numpy()), expected, atol=1e-5)
    quantize(out / "model.onnx", out / "int8.onnx", "int8")
    answers = onnx(out, ids.numpy(), mask.numpy(), "int8.onnx")
    assert (answers * expected).sum(axis=1).min() > 0.98
    assert onnx(out, ids.numpy()[:0], mask.numpy()[:0], "int8.onnx").shape == (0, 32)


def test_names_are_those_of_transformers(family: str) -> None:
    """All but the pooler, which no embedding comes from, and our roles."""
    model = model_of(family)
    tensors = {name: torch.from_numpy(array) for name, array in state_dict(model).items()}
    assert ("roles" in tensors) == model.config.roles
    tensors.pop("roles", None)
    theirs: Any
    if family == "modernbert":
        fields = model.config.encoder.model_dump() | {"pad_token_id": 0}
        theirs = ModernBertModel(ModernBertConfig(**fields | {"layer_types": list(fields["layer_types"])}))
    else:
        theirs = BertModel(BertConfig(**tiny_bert.CONFIG), add_pooling_layer=False)
    theirs.load_state_dict(tensors, strict=True)


def test_weights_come_back_or_are_refused_by_name(family: str) -> None:
    model = model_of(family)
    tensors = state_dict(model)
    again = load_state_dict(model.config, tensors)
    for name, array in state_dict(again).items():
        np.testing.assert_array_equal(array, tensors[name])
    name = next(name for name in tensors if "Wqkv" in name or "self.key.weight" in name)
    for change, message in (
        ({name: tensors[name][:-1]}, rf"tensor '{re.escape(name)}' has shape"),
        ({name: tensors[name].astype(np.float16)}, "has dtype float16"),
        ({name: np.full_like(tensors[name], np.nan)}, "holds NaN or Inf"),
        ({"pooler.dense.bias": tensors[name]}, "'pooler.dense.bias' is unexpected"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_state_dict(model.config, {**tensors, **change})
    tensors.pop(name)
    with pytest.raises(CheckpointError, match=rf"tensor '{re.escape(name)}' is missing"):
        load_state_dict(model.config, tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "prime"}, "model.kind 'prime' is not text"),
        ({"pooling": "max"}, "pooling 'max' is not mean or cls"),
        ({"encoder": {"model_type": "gpt2"}}, "model_type 'gpt2' is none of bert"),
        ({"encoder": None}, "does not describe a model"),
    ],
)
def test_configs_that_torch_refuses(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    fields = text_config().model_dump(mode="json") | change
    (tmp_path / "config.json").write_text(json.dumps({"model": fields}))
    with pytest.raises(torch_text.CheckpointError, match=message):
        torch_text.TextConfig.from_json(tmp_path / "config.json")


def test_long_tables_keep_their_rows_in_eight_bits(tmp_path: Path) -> None:
    """A table of 1,500 words: a quarter of its size, and the same vectors to what 8 bits can say."""
    encoder = tiny_bert.CONFIG | {"vocab_size": 1500}
    config = TextConfig.model_validate(text_config().model_dump() | {"encoder": encoder})
    model = text_model(config)
    to_onnx(model, tmp_path / "model.onnx")
    quantize(tmp_path / "model.onnx", tmp_path / "int8.onnx", "int8")
    sizes = [(tmp_path / name).stat().st_size for name in ("model.onnx", "int8.onnx")]
    assert sizes[1] < sizes[0] - 3 * 1500 * 32 * 0.9
    ids = np.arange(1480).reshape(74, 20)
    expected = np.asarray(model(jnp.asarray(ids), jnp.ones(ids.shape, bool)))
    found = onnx(tmp_path, ids, np.ones(ids.shape), "int8.onnx")
    assert (found * expected).sum(axis=1).min() > 0.98

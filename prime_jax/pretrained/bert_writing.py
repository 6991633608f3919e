"""A trained BERT encoder back into a folder as sentence-transformers and Hugging Face read it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from prime_jax.files import write_json
from prime_jax.pretrained.bert import BertTextEncoder

Tensor = np.ndarray[Any, np.dtype[Any]]


def write_encoder(encoder: BertTextEncoder, folder: Path) -> None:
    """Write an encoder with its tokenizer, pooling and maximum length; reading it gives the same encoder.

    Args:
        encoder: What to write, with the parameters it has now.
        folder: Must not exist.
    """
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(encoder.source.transformer / name, folder / name)
    tensors = {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in _tensors(encoder.params)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    kinds = ("Transformer", "Pooling", "Normalize")
    paths = ("", "1_Pooling", "2_Normalize")
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    (folder / "2_Normalize").mkdir()
    pooling = {
        "word_embedding_dimension": encoder.dim,
        "pooling_mode_cls_token": encoder.pooling == "cls",
        "pooling_mode_mean_tokens": encoder.pooling == "mean",
    }
    write_json(folder / "1_Pooling" / "config.json", pooling)
    settings = {"max_seq_length": encoder.max_length, "do_lower_case": encoder.source.lower_case}
    write_json(folder / "sentence_bert_config.json", settings)


def _tensors(params: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under the name of Hugging Face: the inverse of `load_bert`."""
    yield "embeddings.word_embeddings.weight", np.asarray(params["words"]["embedding"])
    yield "embeddings.position_embeddings.weight", np.asarray(params["positions"]["embedding"])
    yield "embeddings.token_type_embeddings.weight", np.asarray(params["types"]["embedding"])
    yield from _norm("embeddings.LayerNorm", params["norm"])
    for number, layer in params["layers"].items():
        prefix = f"encoder.layer.{number}"
        kernels = np.split(np.asarray(layer["qkv"]["kernel"], np.float32), 3, axis=1)
        biases = np.split(np.asarray(layer["qkv"]["bias"]), 3)
        for part, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True):
            yield from _linear(f"{prefix}.attention.self.{part}", {"kernel": kernel, "bias": bias})
        yield from _linear(f"{prefix}.attention.output.dense", layer["attention_out"])
        yield from _norm(f"{prefix}.attention.output.LayerNorm", layer["attention_norm"])
        yield from _linear(f"{prefix}.intermediate.dense", layer["mlp_in"])
        yield from _linear(f"{prefix}.output.dense", layer["mlp_out"])
        yield from _norm(f"{prefix}.output.LayerNorm", layer["mlp_norm"])


def _linear(name: str, linear: Any) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", np.asarray(linear["kernel"], np.float32).T
    yield f"{name}.bias", np.asarray(linear["bias"])


def _norm(name: str, norm: Any) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", np.asarray(norm["scale"])
    yield f"{name}.bias", np.asarray(norm["bias"])

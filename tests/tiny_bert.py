"""A random BERT folder small enough for tests, and BERT once more in plain torch to compare with."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional

from prime_jax.data.records import Dataset, Example, Passage, write_dataset

HIDDEN, HEADS, LAYERS, INNER, POSITIONS = 32, 4, 2, 48, 64
WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "dogs", "ran", "home", "and", "rain", "fell"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, "hills", "quiet", "over", "##s", "##ing", "##ed"]

CONFIG: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": len(VOCABULARY),
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "max_position_embeddings": POSITIONS,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
}

Tensors = dict[str, torch.Tensor]


def tensors(seed: int = 0) -> Tensors:
    """Random weights under the names of Hugging Face, large enough that every part shows in the answer."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 0.3) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    def norm(name: str) -> Tensors:
        return {f"{name}.weight": 1 + random(HIDDEN), f"{name}.bias": random(HIDDEN)}

    def linear(name: str, inputs: int, outputs: int) -> Tensors:
        return {f"{name}.weight": random(outputs, inputs), f"{name}.bias": random(outputs)}

    made = {
        "embeddings.word_embeddings.weight": random(len(VOCABULARY), HIDDEN),
        "embeddings.position_embeddings.weight": random(POSITIONS, HIDDEN),
        "embeddings.token_type_embeddings.weight": random(2, HIDDEN),
        "embeddings.position_ids": torch.arange(POSITIONS)[None],
        **norm("embeddings.LayerNorm"),
        **linear("pooler.dense", HIDDEN, HIDDEN),
    }
    for number in range(LAYERS):
        layer = f"encoder.layer.{number}"
        for part in ("query", "key", "value"):
            made |= linear(f"{layer}.attention.self.{part}", HIDDEN, HIDDEN)
        made |= linear(f"{layer}.attention.output.dense", HIDDEN, HIDDEN)
        made |= norm(f"{layer}.attention.output.LayerNorm")
        made |= linear(f"{layer}.intermediate.dense", HIDDEN, INNER)
        made |= linear(f"{layer}.output.dense", INNER, HIDDEN)
        made |= norm(f"{layer}.output.LayerNorm")
    return made


def write_folder(
    folder: Path,
    weights: Tensors,
    *,
    config: dict[str, Any] | None = None,
    pooling: str | None = "mean",
    max_length: int | None = None,
) -> Path:
    """Write a sentence-transformers folder; `config` replaces fields, `pooling` None leaves it open."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    save_file(weights, folder / "model.safetensors")
    write_tokenizer(folder / "tokenizer.json", VOCABULARY)
    kinds = ["Transformer"]
    if pooling is not None:
        kinds.append("Pooling")
        flags: dict[str, Any] = {"word_embedding_dimension": HIDDEN}
        flags |= {"pooling_mode_cls_token": pooling == "cls", "pooling_mode_mean_tokens": pooling == "mean"}
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(flags))
    modules = [
        {
            "idx": place,
            "name": str(place),
            "path": f"1_{kind}" if place else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for place, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    if max_length is not None:
        settings = {"max_seq_length": max_length, "do_lower_case": False}
        (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    return folder


def write_tokenizer(path: Path, vocabulary: list[str]) -> None:
    """A WordPiece tokenizer whose file, like MiniLM's, asks for cutting and padding at other lengths."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    ids = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(path))


def token_ids(text: str, max_length: int = POSITIONS) -> list[int]:
    """What the tokenizer must answer for lower-case texts of whole words."""
    words = [VOCABULARY.index(word) if word in VOCABULARY else 1 for word in text.split()]
    return [2, *words[: max_length - 2], 3]


def reference(
    weights: Tensors, ids: list[int], pooling: str, config: dict[str, Any] = CONFIG
) -> torch.Tensor:
    """Unit-norm embedding of one text, unpadded, one head at a time (Devlin et al. 2018)."""
    heads, epsilon = config["num_attention_heads"], config["layer_norm_eps"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(
            x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], epsilon
        )

    x = weights["embeddings.word_embeddings.weight"][ids]
    x = x + weights["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for number in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{number}"
        query, key, value = (
            linear(x, f"{layer}.attention.self.{part}").chunk(heads, dim=-1)
            for part in ("query", "key", "value")
        )
        mixed = [
            torch.softmax(q @ k.T / math.sqrt(q.shape[-1]), dim=-1) @ v
            for q, k, v in zip(query, key, value, strict=True)
        ]
        attended = linear(torch.cat(mixed, dim=-1), f"{layer}.attention.output.dense")
        x = norm(x + attended, f"{layer}.attention.output.LayerNorm")
        inner = linear(x, f"{layer}.intermediate.dense")
        inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
        x = norm(x + linear(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    pooled = x[0] if pooling == "cls" else x.mean(dim=0)
    return pooled / pooled.norm()


def write_texts(folder: Path) -> Path:
    """A data folder in which each query asks for the passage with its last word in it."""
    corpus = tuple(Passage(word, f"a {word} over the hills") for word in WORDS)
    rng = np.random.default_rng(0)

    def example(number: int) -> Example:
        word = WORDS[number % len(WORDS)]
        turns = tuple(f"the {other} sat" for other in rng.choice(WORDS, number % 3))
        return Example(f"e{number}", turns, f"and {rng.choice(WORDS)} while {word}", (word,))

    splits = {
        name: tuple(map(example, range(size))) for name, size in (("train", 48), ("dev", 13), ("test", 13))
    }
    write_dataset(folder, Dataset(corpus, splits))
    return folder

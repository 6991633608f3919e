"""Texts per second of encoders of MiniLM's and MPNet's shape: ours in three precisions beside PyTorch's.

    python -m benchmarks.encoders --out FILE.json [--tiny] [--seconds 120]

Weights are random and the vocabulary is made up, so nothing is downloaded: 6 layers of 384 (MiniLM) and 12 of
768 (MPNet and BERT base, whose layers do the same work), 12 heads each. Texts have exactly 16, 64, 128 or 256
tokens. Contenders take turns in random order, from texts to float32 numpy arrays, tokenizing included;
`tokenizer` is that part alone. PyTorch is sentence-transformers where it is installed, else transformers with
our tokenizer; float16 on a GPU, float32 on a CPU. `cosine` is the least one to our float32. A figure is
written as soon as it is there.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from benchmarks.common import facts
from benchmarks.search import Report, installed
from prime_jax.files import write_json
from prime_jax.nn.bert import BertConfig
from prime_jax.nn.encoders import build_encoder
from prime_jax.nn.torch_layout import tensors_of
from prime_jax.pretrained.bert import BertTextEncoder

Encode = Callable[[Sequence[str]], np.ndarray]
ROUNDS = 5
BATCH = 256  # of PyTorch: large enough for a GPU, and not slower on a CPU by much
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = 1000


class Shape(NamedTuple):
    """Of an encoder."""

    layers: int
    hidden: int
    heads: int


SHAPES = {"MiniLM": Shape(6, 384, 12), "MPNet": Shape(12, 768, 12)}
LENGTHS: tuple[int, ...] = (16, 64, 128, 256)  # tokens


def write_folder(folder: Path, shape: Shape, longest: int) -> Path:
    """An encoder with random weights, as sentence-transformers saves one."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    fields = {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "vocab_size": len(SPECIAL) + WORDS,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": 4 * shape.hidden,
        "max_position_embeddings": longest,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "pad_token_id": 0,
    }
    folder.mkdir(parents=True)
    write_json(folder / "config.json", fields)
    model = build_encoder(BertConfig.parse(fields, "config.json"), jnp.float32)
    tensors = tensors_of(model)
    arrays = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    vocabulary = {word: row for row, word in enumerate([*SPECIAL, *map(word_of, range(WORDS))])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": longest, **roles}
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False})
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"))
    modules = [
        {"idx": row, "name": str(row), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for row, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": shape.hidden, "pooling_mode_mean_tokens": True}
    write_json(folder / "1_Pooling" / "config.json", pooling)
    return folder


def word_of(number: int) -> str:
    """A made-up word of three letters or more."""
    letters = "bcdfghjklm"
    return "".join(letters[int(digit)] for digit in f"{number:03d}")


def texts_of(tokens: int, count: int) -> list[str]:
    """Texts of exactly so many tokens, [CLS] and [SEP] included."""
    rows = np.random.default_rng(tokens).integers(0, WORDS, (count, tokens - 2))
    return [" ".join(word_of(int(number)) for number in row) for row in rows]


def torch_encoder(folder: Path, ours: BertTextEncoder) -> tuple[str, Encode]:
    """Sentence-transformers, or transformers as it would run them; and the name of the figure."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = "float16" if device == "cuda" else "float32"
    dtype = getattr(torch, kind)
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        return f"transformers {kind}", _transformers(folder, ours, device, dtype)
    model: Any = SentenceTransformer(str(folder), device=device)
    model = model.to(dtype)

    def encode(texts: Sequence[str]) -> np.ndarray:
        found = model.encode(list(texts), batch_size=BATCH, normalize_embeddings=True)
        return np.asarray(found, np.float32)

    return f"sentence-transformers {kind}", encode


def _transformers(folder: Path, ours: BertTextEncoder, device: str, dtype: Any) -> Encode:
    import torch
    from transformers import BertModel

    loaded: Any = BertModel.from_pretrained(folder, add_pooling_layer=False)
    model = loaded.eval().to(device=device, dtype=dtype)

    def encode(texts: Sequence[str]) -> np.ndarray:
        ids = ours.tokenize(texts)
        order = np.argsort([-len(row) for row in ids], kind="stable")
        answers = []
        with torch.inference_mode():
            for start in range(0, len(order), BATCH):
                chosen = order[start : start + BATCH]
                tokens, mask = np.zeros((2, len(chosen), len(ids[chosen[0]])), np.int64)
                for row, text in enumerate(chosen):
                    tokens[row, : len(ids[text])], mask[row, : len(ids[text])] = ids[text], 1
                real = torch.from_numpy(mask).to(device)
                hidden = model(
                    input_ids=torch.from_numpy(tokens).to(device), attention_mask=real
                ).last_hidden_state
                pooled = (hidden * real[..., None]).sum(dim=1) / real.sum(dim=1, keepdim=True)
                answers.append(torch.nn.functional.normalize(pooled.float(), dim=-1))
            found = torch.cat(answers).cpu().numpy()
        embeddings = np.empty_like(found)
        embeddings[order] = found
        return embeddings

    return encode


def measure(contenders: dict[str, Encode], texts: list[str], rounds: int, report: Report, place: str) -> None:
    """Texts per second of each contender, in turns; one that fails says so."""
    answers: dict[str, np.ndarray] = {}
    for name, encode in list(contenders.items()):
        try:
            answers[name] = encode(texts)  # compiles
        except Exception as failed:  # one contender's failure must not cost the others their figures
            report.add(f"{place}, {name}", {"failed": f"{type(failed).__name__}: {failed}"[:400]})
    seconds: dict[str, list[float]] = {name: [] for name in answers}
    order = np.random.default_rng(0)  # threads of the one before may still spin
    for _ in range(rounds):
        for name in order.permutation(list(answers)).tolist():
            started = time.perf_counter()
            contenders[name](texts)
            seconds[name].append(time.perf_counter() - started)
    for name, found in seconds.items():
        rate = {"texts_per_s": len(texts) / statistics.median(found), "best": len(texts) / min(found)}
        if name != "tokenizer" and "ours float32" in answers:
            rate["cosine"] = float((answers[name] * answers["ours float32"]).sum(axis=1).min())
        report.add(f"{place}, {name}", rate)


def contenders_of(folder: Path) -> dict[str, Encode]:
    """Ours by precision, the tokenizer alone, and PyTorch's where it is installed."""
    float32 = BertTextEncoder(folder)
    found: dict[str, Encode] = {"ours float32": float32.encode}
    found["ours tf32"] = BertTextEncoder(folder, precision="tf32").encode
    found["ours bfloat16"] = BertTextEncoder(folder, precision="bfloat16").encode
    if jax.default_backend() == "gpu":  # does fused attention win, and from which length on?
        found["ours bfloat16, plain attention"] = BertTextEncoder(
            folder, precision="bfloat16", fused=False
        ).encode

    def tokenize(texts: Sequence[str]) -> np.ndarray:
        return np.array([len(row) for row in float32.tokenize(texts)])

    found["tokenizer"] = tokenize
    try:
        name, encode = torch_encoder(folder, float32)
        found[name] = encode
    except ImportError as missing:
        print(f"no PyTorch contender: {missing}", flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Write the encoders, measure, write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--tiny", action="store_true", help="small encoders and few texts: does it run?")
    parser.add_argument("--tokens", type=int, help="of a contender's one pass; default: 2^20, 2^14 on a CPU")
    parser.add_argument("--seconds", type=float, help="start no further length after that many")
    given = parser.parse_args(argv)
    started = time.perf_counter()
    shapes, lengths, rounds = SHAPES, LENGTHS, ROUNDS
    if given.tiny:
        shapes, lengths, rounds = {"tiny": Shape(1, 64, 4)}, LENGTHS[:1], 2
    tokens = given.tokens or (2**8 if given.tiny else 2**14 if jax.default_backend() == "cpu" else 2**20)
    packages = ("jax", "numpy", "torch", "transformers", "sentence-transformers", "tokenizers")
    report = Report(
        given.out,
        {
            "tiny": given.tiny,
            "tokens_a_pass": tokens,
            "rounds": rounds,
            "batch_of_pytorch": BATCH,
            "shapes": {name: shape._asdict() for name, shape in shapes.items()},
            **facts(*installed(*packages)),
        },
    )
    with tempfile.TemporaryDirectory() as place:
        for name, shape in shapes.items():
            contenders = contenders_of(write_folder(Path(place) / name, shape, max(lengths)))
            for length in lengths:
                where = f"{name}, {length} tokens"
                if given.seconds is not None and time.perf_counter() - started > given.seconds:
                    report.add(where, {"skipped": f"{given.seconds:g} s were over"})
                    continue
                measure(contenders, texts_of(length, max(4, tokens // length)), rounds, report, where)
    report.done()


if __name__ == "__main__":
    main()

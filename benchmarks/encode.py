"""Texts per second of MiniLM: ours beside PyTorch as sentence-transformers runs it, and ONNX Runtime.

    OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.encode --data DIR --out FILE.json

All take the same texts, sorted by length, in float32. In the rounds of `equal batch` all run 32 texts at a
time; `as shipped` is what `BertTextEncoder` does by itself. Contenders take turns, so that what else the
machine does meets all of them; the figures are medians over the rounds, the ratios those of each round.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import facts
from prime_jax.data.encode import load_encoder
from prime_jax.data.records import load_dataset
from prime_jax.export.text import write_encoder_onnx
from prime_jax.files import write_json
from prime_jax.pretrained.bert import BertTextEncoder

BATCH, ROUNDS = 32, 5
Encode = Callable[[Sequence[str]], np.ndarray]


def in_batches(encoder: BertTextEncoder, run: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Encode:
    """Sorted by length, 32 at a time, padded to the longest of the batch: what sentence-transformers does."""

    def encode(texts: Sequence[str]) -> np.ndarray:
        ids = encoder.tokenize(texts)
        order = np.argsort([-len(row) for row in ids], kind="stable")
        answers = np.empty((len(texts), encoder.dim), np.float32)
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            width = len(ids[chosen[0]])
            tokens, mask = np.zeros((2, len(chosen), width), np.int64)
            for row, text in enumerate(chosen):
                tokens[row, : len(ids[text])], mask[row, : len(ids[text])] = ids[text], 1
            answers[chosen] = run(tokens, mask)
        return answers

    return encode


def torch_contender(encoder: BertTextEncoder, threads: int) -> Encode:
    """Transformers' BertModel in eager PyTorch, mean over real tokens, unit norm."""
    import torch
    from transformers import BertModel

    torch.set_num_threads(threads)
    loaded: Any = BertModel.from_pretrained(encoder.source.transformer, add_pooling_layer=False)
    model = loaded.eval()

    def run(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        real = torch.from_numpy(mask)
        with torch.inference_mode():
            hidden = model(input_ids=torch.from_numpy(tokens), attention_mask=real).last_hidden_state
            pooled = (hidden * real[..., None]).sum(dim=1) / real.sum(dim=1, keepdim=True)
            return np.asarray(torch.nn.functional.normalize(pooled, dim=-1).numpy())

    return in_batches(encoder, run)


def onnx_contender(encoder: BertTextEncoder, threads: int, folder: Path) -> Encode:
    """The same encoder as the ONNX file that a bundle carries, in ONNX Runtime."""
    import onnxruntime

    write_encoder_onnx(encoder, folder / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )

    def run(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        feeds = {"input_ids": tokens.astype(np.int32), "attention_mask": mask.astype(np.int32)}
        return np.asarray(session.run(None, feeds)[0])

    return in_batches(encoder, run)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, compare what comes out, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--texts", type=int, default=1024, metavar="N")
    given = parser.parse_args(argv)
    threads = len(os.sched_getaffinity(0))
    corpus = [passage.text for passage in load_dataset(given.data, ("dev",)).corpus]
    chosen = np.random.default_rng(0).permutation(len(corpus))[: given.texts]
    texts = [corpus[row] for row in chosen]
    shipped = load_encoder("minilm")
    assert isinstance(shipped, BertTextEncoder)
    folder = shipped.source.transformer
    with tempfile.TemporaryDirectory() as place:
        contenders: dict[str, Encode] = {
            "prime-jax, equal batch": BertTextEncoder(folder, "mean", 256, batch_size=BATCH).encode,
            "prime-jax, as shipped": shipped.encode,
            "PyTorch": torch_contender(shipped, threads),
            "ONNX Runtime": onnx_contender(shipped, threads, Path(place)),
        }
        answers = {name: encode(texts) for name, encode in contenders.items()}  # compiles, and compares
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(ROUNDS):
            names = list(contenders)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                started = time.perf_counter()
                contenders[name](texts)
                rates[name].append(len(texts) / (time.perf_counter() - started))
    tokens = [len(row) for row in shipped.tokenize(texts)]
    rows: dict[str, Any] = {}
    for name, found in rates.items():
        against = [mine / theirs for mine, theirs in zip(found, rates["PyTorch"], strict=True)]
        rows[name] = {
            "texts_per_second": statistics.median(found),
            "rounds": found,
            "times_pytorch": statistics.median(against),
            "times_pytorch_least": min(against),
            "largest_difference_to_pytorch": float(np.abs(answers[name] - answers["PyTorch"]).max()),
        }
        print(f"{name:<24}{rows[name]['texts_per_second']:8.1f} texts/s {rows[name]['times_pytorch']:6.2f}")
    result = {
        "encoder": "all-MiniLM-L6-v2, float32, texts cut at 256 tokens",
        "set": given.data.name,
        "texts": len(texts),
        "tokens": {"mean": statistics.mean(tokens), "median": statistics.median(tokens), "most": max(tokens)},
        "batch": BATCH,
        "threads": threads,
        "contenders": rows,
        **facts("jax", "flax", "torch", "transformers", "onnxruntime", "jax2onnx"),
    }
    write_json(given.out, result)


if __name__ == "__main__":
    main()

"""What `prefix` and `causal` attention cost in retrieval, beside `full`.

    python -m benchmarks.context_attention --data runs/quickstart/data --seeds 0 1 2

Trains configs/prime_small.yaml once per mode and seed, searches the test split with the predictions,
and compares the modes query by query: scores are averaged over the seeds, whole documents are resampled for
the intervals. Writes context_attention.json; the data and its embeddings are those of `make quickstart`.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import prime_jax
from benchmarks.common import CONFIG, facts
from prime_jax.config import read_config
from prime_jax.data.embedded import embed_dataset
from prime_jax.data.encode import load_encoder
from prime_jax.data.prepare import prepare
from prime_jax.evaluate.arrays import Corpus, Split, retrieve
from prime_jax.evaluate.evaluation import COMPARED, DEPTH
from prime_jax.evaluate.run import split_arrays
from prime_jax.evaluate.significance import compare, interval
from prime_jax.files import write_json
from prime_jax.retrieval.groups import linked
from prime_jax.retrieval.metrics import ranking_metrics
from prime_jax.train.__main__ import main as train

MODES = ("full", "prefix", "causal")


def predicted(mode: str, seed: int, data: Path, test: Split) -> np.ndarray:
    """Train one mode with one seed and predict for every query of the split, `[Q, E]`."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--data.path", str(data), "--train.seed", str(seed), "--model.context-attention", mode]
        if train(["--config", str(CONFIG), "--out", folder, *options]):
            sys.exit(f"training {mode} with seed {seed} failed")
        return prime_jax.load(folder, precision="float32").predict(test.context, test.query, test.mask)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    test, corpus, groups = load_test(given.data)
    scores: dict[str, dict[str, np.ndarray]] = {}
    for mode in MODES:
        runs = []
        for seed in given.seeds:
            _, indices = retrieve(predicted(mode, seed, given.data, test), test, corpus, DEPTH)
            runs.append(ranking_metrics(indices, test.positives))
        scores[mode] = {metric: np.stack([run[metric] for run in runs]) for metric in COMPARED}
    result = {
        **facts("jax", "flax", "optax"),
        "queries": len(test.query),
        "documents": len(np.unique(groups)),
        "seeds": given.seeds,
        "modes": {mode: summary(scores[mode], scores["full"], groups) for mode in MODES},
    }
    write_json(given.out / "context_attention.json", result)
    for mode in MODES:
        figures = result["modes"][mode]
        print(mode, {metric: round(figure["mean"], 4) for metric, figure in figures.items()})


def load_test(data: Path) -> tuple[Split, Corpus, np.ndarray]:
    """The test split, the corpus, and which queries come from one document."""
    encoder = load_encoder("minilm")
    dataset, embeddings = prepare(data, ("train", "dev", "test"), encoder)
    embedded = embed_dataset(dataset, embeddings, max_context_length=10)
    source = read_config(CONFIG, []).data
    test = split_arrays(dataset, embedded, encoder, source)["test"]
    groups = linked([(*example.context, example.query) for example in dataset.splits["test"]])
    return test, Corpus(embedded.corpus(), embedded.corpus_scope), groups


def summary(ours: dict[str, np.ndarray], full: dict[str, np.ndarray], groups: np.ndarray) -> dict[str, Any]:
    """Mean, interval, each seed's figure and the paired difference to `full` of every metric."""
    figures: dict[str, Any] = {}
    for metric, by_seed in ours.items():
        mean, other = by_seed.mean(axis=0), full[metric].mean(axis=0)
        difference = compare(mean, other, seed=0, groups=groups)
        figures[metric] = {
            "mean": float(mean.mean()),
            "interval": interval(mean, seed=0, groups=groups),
            "by_seed": by_seed.mean(axis=1).tolist(),
            "difference_to_full": difference.difference,
            "difference_interval": [difference.low, difference.high],
            "p": difference.p,
        }
    return figures


if __name__ == "__main__":
    main()

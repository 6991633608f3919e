"""Sixty-four callers at once through the batcher, against the same requests one at a time.

    python -m benchmarks.batcher --run runs/quickstart

Without a run, a random model of the quickstart's shape serves. Both ways take turns for several rounds; every
answer must equal its own single answer to 1e-5. Writes batcher.json, or batcher_<config>.json.
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import prime_jax
from benchmarks.common import CONFIG, facts, random_model
from prime_jax.files import write_json
from prime_jax.predict.batcher import Batcher
from prime_jax.predict.predictor import Predictor

TOLERANCE = 1e-5


def served(run: Path | None, config: Path, precision: Any) -> Predictor:
    """The predictor of a run, or of a random model of a configuration."""
    if run is not None:
        return prime_jax.load(run, precision=precision)
    return Predictor.from_model(random_model(config), precision=precision)


def one_at_a_time(predictor: Predictor, context: np.ndarray, query: np.ndarray) -> list[np.ndarray]:
    """A service without a batcher: one request after the other."""
    return [predictor.predict(*request) for request in zip(context, query, strict=True)]


def threads(
    batcher: Batcher, pool: ThreadPoolExecutor, context: np.ndarray, query: np.ndarray
) -> list[np.ndarray]:
    """Callers in threads, each waiting for its answer before it asks again."""
    return list(pool.map(batcher.predict, context, query))


def tasks(batcher: Batcher, callers: int, context: np.ndarray, query: np.ndarray) -> list[np.ndarray]:
    """Callers in asyncio tasks, each waiting for its answer before it asks again."""
    answers: list[np.ndarray] = [np.empty(0)] * len(query)

    async def caller(rows: range) -> None:
        for row in rows:
            answers[row] = await batcher.predict_async(context[row], query[row])

    async def everyone() -> None:
        await asyncio.gather(*(caller(range(first, len(query), callers)) for first in range(callers)))

    asyncio.run(everyone())
    return answers


def device_gain(predictor: Predictor, context: np.ndarray, query: np.ndarray) -> float:
    """How much faster the device alone answers a request in a full batch: what no batcher can exceed."""
    most = int(predictor.info()["batch_shapes"][-1])

    def seconds(size: int) -> float:
        taken = []
        for _ in range(50):
            started = time.perf_counter()
            predictor.predict(context[:size], query[:size])
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    return most * seconds(1) / seconds(most)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2048, help="in each round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    predictor = served(given.run, given.config, given.precision)
    config = predictor.model.config
    random = np.random.default_rng(0)
    context = random.normal(size=(given.requests, config.max_context_length, config.input_dim)).astype(
        np.float32
    )
    query = random.normal(size=(given.requests, config.input_dim)).astype(np.float32)
    sizes: list[int] = []
    pool = ThreadPoolExecutor(given.callers)
    with predictor.batcher(on_call=sizes.append) as batcher:
        ways: dict[str, Callable[[], list[np.ndarray]]] = {
            "one at a time": lambda: one_at_a_time(predictor, context, query),
            "threads": lambda: threads(batcher, pool, context, query),
            "asyncio tasks": lambda: tasks(batcher, given.callers, context, query),
        }
        expected = np.stack(ways["one at a time"]())
        rates: dict[str, list[float]] = {name: [] for name in ways}
        furthest: dict[str, float] = dict.fromkeys(ways, 0.0)
        for _ in range(given.rounds):
            for name, way in ways.items():
                started = time.perf_counter()
                answers = np.stack(way())
                rates[name].append(given.requests / (time.perf_counter() - started))
                furthest[name] = max(furthest[name], float(np.abs(answers - expected).max()))
    pool.shutdown()
    ceiling = device_gain(predictor, context, query)
    medians = {name: statistics.median(rate) for name, rate in rates.items()}
    figures: dict[str, Any] = {
        name: {
            "requests_per_second": medians[name],
            "times_one_at_a_time": medians[name] / medians["one at a time"],
            "largest_difference": furthest[name],
        }
        for name in ways
    }
    for name, figure in figures.items():
        rate, ratio = figure["requests_per_second"], figure["times_one_at_a_time"]
        print(f"{name:14} {rate:8,.0f} requests/s  {ratio:5.2f} x  differs by {furthest[name]:.0e}")
    print(f"the device alone gains {ceiling:.2f} x from full batches")
    result = {
        **facts("jax", "jaxlib", "numpy"),
        "parameters": predictor.model.num_params(),
        "precision": given.precision,
        "callers": given.callers,
        "requests": given.requests,
        "rounds": given.rounds,
        "mean_batch": float(np.mean(sizes)),
        "device_gain": ceiling,
        "ways": figures,
    }
    name = "batcher" if given.config == CONFIG else f"batcher_{given.config.stem}"
    write_json(given.out / f"{name}.json", result)
    if given.precision == "float32" and max(furthest.values()) > TOLERANCE:
        sys.exit(f"an answer differs from its own single answer by more than {TOLERANCE}")


if __name__ == "__main__":
    main()

"""Many callers through the batcher, beside one request at a time.

    python -m benchmarks.batcher --run runs/quickstart --out benchmarks/results

One at a time is the plainest loop: `predict` on one request after the other, nothing in between. Beside it
stand as many threads that call `predict` themselves, one caller through the batcher (who waits for company
that never comes), and the batcher under threads and under asyncio. They take turns for several rounds, and
medians are compared. Every answer of every round must equal the request's own single answer to 1e-5. Float32
throughout. Without --run the quickstart's model serves with random weights. Writes batcher.json.
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
from rich.table import Table

import prime_jax
from benchmarks.common import Asked, facts, random_model, sample
from prime_jax.files import write_json
from prime_jax.predict.batcher import Batcher
from prime_jax.predict.predictor import Predictor
from prime_jax.progress import console, progress

ALONE = "one at a time"
TOLERANCE = 1e-5
Answers = list[np.ndarray]
Way = Callable[[list[Asked]], Answers]


def ways(predictor: Predictor, batcher: Batcher, callers: int, pool: ThreadPoolExecutor) -> dict[str, Way]:
    """Every way to have requests answered, by the name it has in the results."""

    async def all_tasks(requests: list[Asked]) -> Answers:
        """Each task sends its next request when it has the answer to the last, as a thread does."""
        answers: Answers = [np.empty(0)] * len(requests)

        async def caller(first: int) -> None:
            for row in range(first, len(requests), callers):
                answers[row] = await batcher.predict_async(*requests[row])

        await asyncio.gather(*(caller(first) for first in range(callers)))
        return answers

    return {
        ALONE: lambda requests: [predictor.predict(*request) for request in requests],
        f"{callers} threads, no batcher": lambda requests: list(
            pool.map(lambda request: predictor.predict(*request), requests)
        ),
        "one caller through the batcher": lambda requests: [
            batcher.predict(*request) for request in requests
        ],
        f"{callers} threads through the batcher": lambda requests: list(
            pool.map(lambda request: batcher.predict(*request), requests)
        ),
        f"{callers} asyncio tasks through the batcher": lambda requests: asyncio.run(all_tasks(requests)),
    }


def time_in_turns(
    ways: dict[str, Way], requests: list[Asked], expected: Answers, rounds: int, batcher: Batcher
) -> dict[str, dict[str, Any]]:
    """Requests per second of every way in every round, largest error, and requests per device call."""
    found: dict[str, dict[str, Any]] = {
        name: {"per_second": [], "largest_error": 0.0, "requests_per_call": None} for name in ways
    }
    with progress("Timing", rounds * len(ways), "turns") as step:
        for each in range(rounds + 1):
            for name, way in ways.items():
                before = batcher.stats()
                started = time.perf_counter()
                answers = way(requests)
                taken = time.perf_counter() - started
                after, figures = batcher.stats(), found[name]
                error = float(np.abs(np.subtract(answers, expected)).max())
                figures["largest_error"] = max(figures["largest_error"], error)
                if each == 0:  # the first round starts threads and fills caches
                    continue
                figures["per_second"].append(len(requests) / taken)
                if calls := after.calls - before.calls:
                    figures["requests_per_call"] = (after.requests - before.requests) / calls
                step(1, name)
    return found


def main() -> int:
    """Run the benchmark; 1 if an answer was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="run or bundle (default: random weights)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2048, help="in each turn of each way")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--max-delay-ms", type=float, default=2.0)
    parser.add_argument("--max-batch", type=int, help="default: the largest compiled batch")
    given = parser.parse_args()
    if given.run is None:
        predictor = Predictor.from_model(random_model(), precision="float32")
    else:
        predictor = prime_jax.load(given.run, precision="float32")
    requests = sample(predictor.model.config, given.requests)
    expected = [predictor.predict(*request) for request in requests]
    with (
        predictor.batcher(max_delay_ms=given.max_delay_ms, max_batch=given.max_batch) as batcher,
        ThreadPoolExecutor(given.callers) as pool,
    ):
        compared = ways(predictor, batcher, given.callers, pool)
        found = time_in_turns(compared, requests, expected, given.rounds, batcher)
    alone = statistics.median(found[ALONE]["per_second"])
    for figures in found.values():
        figures["median_per_second"] = statistics.median(figures["per_second"])
        figures["times_one_at_a_time"] = figures["median_per_second"] / alone
    settings = {name: value for name, value in vars(given).items() if name not in ("run", "out")}
    write_json(
        given.out / "batcher.json",
        {
            **facts("jax", "jaxlib", "flax", "numpy"),
            "model": {
                "weights": "random" if given.run is None else "trained",
                "parameters": predictor.model.num_params(),
                **predictor.model.config.model_dump(),
            },
            "settings": {**settings, "precision": "float32"},
            "ways": found,
        },
    )
    show(found)
    wrong = [name for name, figures in found.items() if not figures["largest_error"] <= TOLERANCE]
    if wrong:
        print(f"answers differ from single ones by more than {TOLERANCE}: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def show(found: dict[str, dict[str, Any]]) -> None:
    """The figures as a table."""
    table = Table("", title="requests per second, median")
    for column in ("per second", "times one at a time", "per device call", "largest error"):
        table.add_column(column, justify="right")
    for name, figures in found.items():
        joined = figures["requests_per_call"]
        table.add_row(
            name,
            f"{figures['median_per_second']:,.0f}",
            f"{figures['times_one_at_a_time']:.2f}",
            "1" if joined is None else f"{joined:.1f}",
            f"{figures['largest_error']:.0e}",
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())

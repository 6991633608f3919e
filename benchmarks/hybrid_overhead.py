"""What watching a run costs while nothing jumps: processor time per step, watched against plain, interleaved.

    python -m benchmarks.hybrid_overhead --data DIR --out benchmarks/results/hybrid_overhead.json

Language models of two sizes: one whose step takes milliseconds, one whose step takes a realistic time. A
round is a few windows of plain steps, then as many of watched ones, from states of their own; the figure is
the median over rounds. Processor time of the whole process is compared: other programs do not count.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax

from benchmarks.common import facts
from benchmarks.hybrid import CONFIG, Runner
from benchmarks.hybrid_tasks import lm
from prime_jax.files import write_json
from prime_jax.hybrid.settings import HybridConfig

MODELS = {
    "small": {"rows": 8, "length": 32, "width": 64, "layers": 2},
    "large": {"rows": 8, "length": 128, "width": 256, "layers": 4},
}


def spent(run: Callable[[], Any]) -> float:
    """Processor seconds, all threads, until the result is there."""
    started = time.process_time()
    jax.block_until_ready(run())
    return time.process_time() - started


def measured(run: Runner, rounds: int, windows: int) -> dict[str, Any]:
    """Milliseconds of processor time per step, and what an observation takes."""
    config = replace(CONFIG, predict=False)
    count = windows * config.window
    batches = [run.task.batches(0, at) for at in range(count)]
    trainers = {name: run.trainer(0, made) for name, made in (("watched", config), ("plain", OFF))}
    states = {name: run.state(0, "constant", 1e-3, 2000) for name in trainers}

    def steps(name: str) -> Any:
        for batch in batches:
            states[name], _ = trainers[name].step(states[name], batch)
        return states[name], trainers[name].hybrid

    for name, trainer in trainers.items():
        trainer.init(states[name])
        steps(name)  # compiles
    told: dict[str, list[float]] = {"plain": [], "watched": []}
    for _ in range(rounds):
        for name, values in told.items():
            values.append(1000 * spent(partial(steps, name)) / count)
    params = sum(leaf.size for leaf in jax.tree.leaves(states["plain"]["params"]))
    return {
        "weights": params,
        "plain_ms": median(told["plain"]),
        "watched_ms": median(told["watched"]),
        "overhead": median(b / a - 1 for a, b in zip(told["plain"], told["watched"], strict=True)),
        "rounds": told,
        "observations_per_round": windows,
    }


OFF = HybridConfig(enabled=False)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both sizes and write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args(argv)
    known = facts("jax", "flax", "optax")
    result: dict[str, Any] = {
        "prime_jax": known["prime_jax"],
        "versions": known["versions"],
        "machine": {name: known["machine"][name] for name in ("device", "cores")},
        "window": CONFIG.window,
    }
    for name, sizes in MODELS.items():
        run = Runner(lm(given.data, **sizes), "lm")
        result[name] = {**sizes, **measured(run, given.rounds, 10 if name == "small" else 1)}
        write_json(given.out, result)
        print(name, {k: v for k, v in result[name].items() if k != "rounds"}, flush=True)


if __name__ == "__main__":
    main()

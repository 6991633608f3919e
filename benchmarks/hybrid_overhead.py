"""What watching a run costs while nothing jumps: processor time per step, beside that of the step itself.

    python -m benchmarks.hybrid_overhead --data DIR --out benchmarks/results/hybrid_overhead.json

Watching reads every weight once per window, whatever a step costs; so its share falls with the tokens of a
batch. Language models: a tiny one, and one of 3M weights with batches of three sizes. Watching is timed by
itself, around a step that does nothing, in rounds that take turns with rounds of plain steps: the difference
of two runs would be noise. Processor time of the whole process is compared: other programs do not count.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import jax

from benchmarks.common import facts
from benchmarks.hybrid import CONFIG, Runner
from benchmarks.hybrid_tasks import lm
from prime_jax.files import write_json

MODELS = {
    "tiny": {"rows": 8, "length": 32, "width": 64, "layers": 2},
    "1,024 tokens": {"rows": 8, "length": 128, "width": 256, "layers": 4},
    "4,096 tokens": {"rows": 32, "length": 128, "width": 256, "layers": 4},
    "16,384 tokens": {"rows": 128, "length": 128, "width": 256, "layers": 4},
}
WATCHING = replace(CONFIG, predict=False)
WINDOWS = 5  # in a round


def spent(run: Callable[[], Any]) -> float:
    """Processor seconds, all threads, until the result is there."""
    started = time.process_time()
    jax.block_until_ready(run())
    return time.process_time() - started


def measured(run: Runner, rounds: int) -> dict[str, Any]:
    """Milliseconds of processor time per step: of the plain step, and of watching it."""
    window, batch = WATCHING.window, run.task.batches(0, 0)
    state = run.state(0, "constant", 1e-3, 2000)
    state, metrics = run.step(state, batch)  # compiles
    trainer = run.trainer(0, WATCHING, step=lambda state, batch: (state, metrics))
    trainer.init(state)

    def watch() -> Any:
        for _ in range(WINDOWS * window):
            trainer.step(state, batch)
        return trainer.hybrid

    watch()  # compiles
    told: dict[str, list[float]] = {"plain": [], "watching": []}
    moving = run.state(0, "constant", 1e-3, 2000)  # a step gives its state up
    for _ in range(rounds):
        count = 0
        started = time.process_time()
        while count < 2 or time.process_time() - started < 1.0:
            moving, _ = run.step(moving, batch)
            jax.block_until_ready(moving)
            count += 1
        told["plain"].append(1000 * (time.process_time() - started) / count)
        told["watching"].append(1000 * spent(watch) / (WINDOWS * window))
    return {
        "weights": sum(leaf.size for leaf in jax.tree.leaves(state["params"])),
        "plain_ms": median(told["plain"]),
        "watching_ms": median(told["watching"]),
        "overhead": median(told["watching"]) / median(told["plain"]),
        "rounds": told,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every size and write the file."""
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
        "window": WATCHING.window,
    }
    for name, sizes in MODELS.items():
        run = Runner(lm(given.data, **sizes), "lm")
        result[name] = {**sizes, **measured(run, given.rounds)}
        write_json(given.out, result)
        print(name, {k: v for k, v in result[name].items() if k != "rounds"}, flush=True)


if __name__ == "__main__":
    main()

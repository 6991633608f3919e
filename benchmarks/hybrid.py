"""What hybrid training saves against tuned AdamW, at equal cost, and how good its predictions are.

    python -m benchmarks.hybrid --data DIR --task lm --out benchmarks/results/hybrid_lm.json

Costs are full steps: a forward pass counts a third, and what a correction takes is taken from the real
steps, so every method of a cell has cost the same. Three methods share a schedule (constant, WSD, cosine;
peak rate tuned for each at the middle length, seed 100): `plain`; `end`, which stops earlier and corrects;
`full`, which also jumps on the way. `end` follows the plain run, whose schedule it does not finish; `full` is
a run of its own. Cells are added to the file one by one; what is in it is not run again.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.common import facts
from benchmarks.hybrid_quality import move_quality, prequential
from benchmarks.hybrid_tasks import TASKS, Task
from prime_jax.files import read_json, write_json
from prime_jax.hybrid.settings import HybridConfig
from prime_jax.hybrid.wrap import HybridTrainer

LENGTHS, SEEDS = (400, 800, 1600), (0, 1, 2)
SCHEDULES = ("constant", "wsd", "cosine")
WARMUP, DECAY = 20, 0.2  # steps of warm-up; share of a WSD run that decays
RATES = {"embed": (5e-4, 1e-3, 2e-3), "lm": (4e-3, 8e-3, 16e-3)}
TUNING_SEED = 100
CONFIG = HybridConfig(warmup_steps=100, horizons=(0, 5, 10, 25, 50))


def rates(schedule: str, peak: float, total: int) -> np.ndarray:
    """The learning rate of every step, padded to one length so that one program serves all runs."""
    at = np.arange(max(LENGTHS))
    warm = np.minimum(1.0, (at + 1) / WARMUP)
    done = np.clip(at / total, 0, 1)
    shape = {
        "constant": np.ones(len(at)),
        "wsd": np.clip((1 - done) / DECAY, 0, 1),
        "cosine": 0.5 * (1 + np.cos(np.pi * done)),
    }[schedule]
    return np.asarray(peak * warm * shape, np.float32)


def params_of(state: Any) -> Any:
    """The weights in a state."""
    return state["params"]


class Runner:
    """One task, its compiled step and its losses."""

    def __init__(self, task: Task):
        self.task = task
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.99), optax.add_decayed_weights(0.01)
        )
        self.loss = jax.jit(task.loss)

        @partial(jax.jit, donate_argnums=0)
        def step(state: Any, batch: Any) -> tuple[Any, Any]:
            value, gradient = jax.value_and_grad(task.loss)(state["params"], batch)
            updates, opt_state = self.optimizer.update(gradient, state["opt_state"], state["params"])
            rate = state["rates"][state["step"]]
            moved = jax.tree.map(lambda p, u: p - rate * u, state["params"], updates)
            new = {**state, "params": moved, "opt_state": opt_state, "step": state["step"] + 1}
            return new, {"loss": value, "gradient_norm": optax.tree.norm(gradient)}

        self.step = step

    def state(self, seed: int, schedule: str, peak: float, total: int) -> Any:
        """A fresh run."""
        params = self.task.init(seed)
        return {
            "params": params,
            "opt_state": self.optimizer.init(params),
            "step": jnp.zeros((), jnp.int32),
            "rates": jnp.asarray(rates(schedule, peak, total)),
        }

    def judged(self, params: Any) -> float:
        """Validation loss."""
        return float(np.mean([float(self.loss(params, batch)) for batch in self.task.validation]))

    def trainer(self, seed: int, config: HybridConfig) -> HybridTrainer:
        """The wrapper; its cursor is how many real steps it saw."""

        def fresh(count: int) -> list[Any]:
            at = trainer.totals.steps
            return [self.task.batches(seed, at + ahead) for ahead in range(count)]

        trainer = HybridTrainer(
            self.step,
            params_of,
            lambda state, params: {**state, "params": params},
            self.task.loss,
            config,
            control=self.task.control,
            fresh=fresh,
        )
        return trainer

    def plain(self, seed: int, schedule: str, peak: float, total: int) -> float:
        """Validation loss of a plain run."""
        state = self.state(seed, schedule, peak, total)
        for at in range(total):
            state, _ = self.step(state, self.task.batches(seed, at))
        return self.judged(state["params"])


def end_cost(config: HybridConfig) -> int:
    """Full steps that the correction at the end takes, rounded up."""
    forwards = (3 + len(config.ema_steps)) * config.control_batches / 3
    return int(np.ceil(config.coefficient_gradients + forwards))


def shared_run(
    run: Runner, seed: int, schedule: str, peak: float, total: int, branches: Sequence[int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`plain` and `end` of one trajectory, at each of the branches; and how good the predictions were."""
    config = HybridConfig(**{**vars(CONFIG), "predict": False})
    trainer, cost = run.trainer(seed, config), end_cost(config)
    state = run.state(seed, schedule, peak, total)
    trainer.init(state)
    found: dict[str, Any] = {str(length): {} for length in branches}
    for at in range(total):
        for length in branches:
            if at == length - cost:
                saved = jax.tree.map(jnp.copy, trainer.saved())
                rows = list(trainer.rows)
                branch, outcome = trainer.finish(jax.tree.map(jnp.copy, state))
                assert outcome is not None
                cell = found[str(length)]
                cell["end"] = run.judged(branch["params"])
                cell["stopped"] = run.judged(state["params"])
                cell["choice"], cell["cost"] = outcome.choice, outcome.cost
                cell["control_gain"] = 1 - outcome.after / outcome.before
                trainer.restore(saved)
                trainer.rows = rows
        state, _ = trainer.step(state, run.task.batches(seed, at))
        if at + 1 in branches:
            found[str(at + 1)]["plain"] = run.judged(state["params"])
    return found, prequential(trainer.rows, CONFIG)


def full_run(run: Runner, seed: int, schedule: str, peak: float, total: int) -> dict[str, Any]:
    """A run that jumps and corrects, all within the cost of `total` steps."""
    real = int((total - end_cost(CONFIG)) / (1 + CONFIG.probe_share))
    trainer, state = run.trainer(seed, CONFIG), run.state(seed, schedule, peak, real)
    trainer.init(state)
    for at in range(real):
        state, _ = trainer.step(state, run.task.batches(seed, at))
    state, outcome = trainer.finish(state)
    assert outcome is not None
    spent = trainer.totals.steps + trainer.totals.cost
    assert spent <= total, f"{spent} steps spent of {total}"
    return {
        "full": run.judged(state["params"]),
        "totals": trainer.totals.summary(),
        "jumps": [[o.step, o.horizon, o.choice, o.before, o.after] for o in trainer.outcomes],
        "calls": dict(trainer.calls),
    }


def seconds(run: Runner, config: HybridConfig | None, steps: int = 200) -> float:
    """Wall-clock seconds per step, the wrapper's observations included."""
    trainer = run.trainer(0, config or HybridConfig(enabled=False))
    state = run.state(0, "constant", 1e-3, steps)
    trainer.init(state)
    for at in range(20):
        state, _ = trainer.step(state, run.task.batches(0, at))
    jax.block_until_ready(state)
    started = time.perf_counter()
    for at in range(20, 20 + steps):
        state, _ = trainer.step(state, run.task.batches(0, at))
    jax.block_until_ready(state)
    return (time.perf_counter() - started) / steps


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not in the file yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    given = parser.parse_args(argv)
    run = Runner(TASKS[given.task](given.data))
    result: dict[str, Any] = read_json(given.out) if given.out.exists() else {}
    settings = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(CONFIG).items()}
    same = {"task": given.task, "about": run.task.about, "settings": settings}
    if any(result.get(name, value) != value for name, value in same.items()):
        sys.exit(f"{given.out} holds results of another task or of other settings; choose another file")
    known = facts("jax", "flax", "optax")
    result |= {**same, "prime_jax": known["prime_jax"], "versions": known["versions"]}
    result["machine"] = {name: known["machine"][name] for name in ("device", "cores")}

    def cell(part: str, name: str, make: Any) -> Any:
        if name not in result.setdefault(part, {}):
            started = time.perf_counter()
            result[part][name] = make()
            write_json(given.out, result)
            print(f"{part} {name}: {time.perf_counter() - started:.0f} s", flush=True)
        return result[part][name]

    middle = LENGTHS[1]
    peaks = {}
    for schedule in SCHEDULES:
        tried = {
            peak: cell(
                "tuning",
                f"{schedule} {peak:g}",
                partial(run.plain, TUNING_SEED, schedule, peak, middle),
            )
            for peak in RATES[given.task]
        }
        peaks[schedule] = min(tried, key=lambda peak: tried[peak])
    result["peaks"] = peaks
    cell(
        "seconds",
        "per step",
        lambda: {
            "plain": seconds(run, None),
            "watched": seconds(run, HybridConfig(**{**vars(CONFIG), "predict": False})),
        },
    )
    for seed in SEEDS:
        for schedule in SCHEDULES:
            runs = [(LENGTHS[-1], LENGTHS)] if schedule == "constant" else [(n, (n,)) for n in LENGTHS]
            for total, branches in runs:
                name = f"{schedule} {total} seed {seed}"
                make: Any = partial(shared_run, run, seed, schedule, peaks[schedule], total, branches)
                cell("shared", name, make)
    slow = peaks["wsd"] / 10
    for seed in SEEDS:
        name = f"wsd {middle} seed {seed}, a tenth of the rate"
        cell("undertuned", name, partial(shared_run, run, seed, "wsd", slow, middle, (middle,)))
    for seed in SEEDS:
        for schedule in ("constant", "cosine"):
            make = partial(move_quality, run, seed, schedule, peaks[schedule], middle)
            cell("moves", f"{schedule} seed {seed}", make)
    for length in LENGTHS:
        for seed in SEEDS:
            for schedule in SCHEDULES:
                name = f"{schedule} {length} seed {seed}"
                cell("full", name, partial(full_run, run, seed, schedule, peaks[schedule], length))
    write_json(given.out, result)


if __name__ == "__main__":
    main()

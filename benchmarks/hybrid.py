"""What hybrid training saves against tuned AdamW, at equal cost, and how good its predictions are.

    python -m benchmarks.hybrid --data DIR --task lm --out benchmarks/results/hybrid_lm.json

Costs are full steps: a forward pass counts a third, and what a correction takes is taken from the real
steps, so every method of a cell has cost the same. Methods share a schedule (constant, WSD, cosine; peak rate
tuned for each at the middle length, seed 100): `plain`; `end`, which stops before the end by what a full
correction takes; with `--full` also `full`, which jumps on the way. Where `end` keeps nothing, what is left
of its budget is trained on: it is the plain run but for the steps that the screen cost, which are lost.
`end` follows the plain run, whose schedule it does not finish; `full` is a run of its own. `stopped cosine`
is a cosine planned for more steps than there are, stopped and corrected. Steps saved are read off the losses
of plain runs of more lengths (`hybrid_report.py`).
Cells are added to the file one by one; what is in it is not run again.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.common import facts
from benchmarks.hybrid_quality import move_quality, prequential
from benchmarks.hybrid_tasks import CONTROL, TASKS, Task, with_lora
from prime_jax.files import read_json, write_json
from prime_jax.hybrid.decide import rows_of
from prime_jax.hybrid.jumps import FORWARD, end_cost
from prime_jax.hybrid.settings import HybridConfig
from prime_jax.hybrid.wrap import HybridTrainer

SEEDS = (0, 1, 2)
LENGTHS = {"embed": (400, 600, 900), "lm": (400, 800, 1600)}
# plain runs of more lengths, so that losses can be read as steps
BETWEEN = {"embed": (320, 500, 750, 1100), "lm": (320, 500, 1000, 2000)}
SCHEDULES = ("constant", "wsd", "cosine")
WARMUP, DECAY = 20, 0.2  # steps of warm-up; share of a WSD run that decays
RATES = {"embed": (2.5e-4, 5e-4, 1e-3), "lm": (2e-3, 4e-3, 8e-3)}
WEIGHT_DECAY = {"embed": 0.1, "lm": 0.01}
STOPPED = 0.7  # share of a cosine after which it is stopped and corrected, in rows of their own
LONGEST = 3000
TUNING_SEED = 100
CONFIG = HybridConfig(predict=True, warmup_steps=50, confidence_threshold=0.0, probe_share=0.05)


def settings_for(length: int) -> HybridConfig:
    """Settings of a run: looking at its end, and finding nothing, costs at most 1% of the steps.

    A control batch costs a 24th of a step, an eighth of a forward pass. A quarter of them is looked at six
    times (raw weights and five candidates), the others twice: an eighth of a step for each.
    """
    batches = max(32, min(CONTROL, round(0.01 * 8 * length)))
    return replace(CONFIG, control_batches=batches, screen_batches=batches // 4)


def rates(schedule: str, peak: float, total: int) -> np.ndarray:
    """The learning rate of every step, padded to one length so that one program serves all runs."""
    at = np.arange(LONGEST)
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

    def __init__(self, task: Task, name: str):
        self.task, self.name, self.config = task, name, CONFIG
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.scale_by_adam(b2=0.99),
            optax.add_decayed_weights(WEIGHT_DECAY[name]),
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

    def trainer(self, seed: int, config: HybridConfig, step: Any = None) -> HybridTrainer:
        """The wrapper, around another step where one is given; its cursor is how many real steps it saw."""

        def fresh(count: int) -> list[Any]:
            at = trainer.totals.steps
            return [self.task.batches(seed, at + ahead) for ahead in range(count)]

        trainer = HybridTrainer(
            step or self.step,
            params_of,
            lambda state, params: {**state, "params": params},
            self.task.loss,
            config,
            control=self.task.control[: config.control_batches],
            fresh=fresh,
        )
        return trainer

    def trained(self, seed: int, schedule: str, peak: float, total: int) -> Any:
        """State at the end of a plain run."""
        state = self.state(seed, schedule, peak, total)
        for at in range(total):
            state, _ = self.step(state, self.task.batches(seed, at))
        return state

    def plain(self, seed: int, schedule: str, peak: float, total: int) -> float:
        """Validation loss of a plain run."""
        return self.judged(self.trained(seed, schedule, peak, total)["params"])


def taken(run: Runner, length: int) -> int:
    """Full steps that the end of a run takes at most, rounded up."""
    forward = FORWARD * rows_of(run.task.control[0]) / rows_of(run.task.batches(0, 0))
    return int(np.ceil(end_cost(settings_for(length), forward)))


def shared_run(
    run: Runner,
    seed: int,
    schedule: str,
    peak: float,
    total: int,
    branches: Sequence[int],
    planned: int | None = None,
) -> dict[str, Any]:
    """`plain` and `end` of one trajectory, at each of the branches; and how good the predictions were.

    Args:
        run: The task.
        seed: Of weights and batches.
        schedule: Of the learning rate.
        peak: Its highest value.
        total: Steps.
        branches: Lengths that are compared.
        planned: Steps that the schedule is made for, where it is stopped before its end; `total` by default.
    """
    trainer = run.trainer(seed, replace(CONFIG, predict=False))
    state = run.state(seed, schedule, peak, planned or total)
    trainer.init(state)
    found: dict[str, Any] = {str(length): {} for length in branches}
    ending: dict[int, str] = {}  # where a run that keeps nothing arrives with what is left
    losses = []
    stops = {length: length - taken(run, length) for length in branches}
    for at in range(total):
        for length in branches:
            if at == stops[length]:
                ended = run.trainer(seed, replace(settings_for(length), predict=False))
                ended.init(state)
                ended.restore(jax.tree.map(jnp.copy, trainer.saved()))
                branch, outcome = ended.finish(jax.tree.map(jnp.copy, state))
                assert outcome is not None
                cell = found[str(length)]
                cell["stopped"] = run.judged(state["params"])
                if outcome.kept:
                    cell["end"] = run.judged(branch["params"])
                else:
                    ending[length - math.ceil(outcome.cost)] = str(length)
                cell |= {name: getattr(outcome, name) for name in ("choice", "kept", "cost")}
                cell["control_gain"] = 1 - outcome.after / outcome.before
        state, told = trainer.step(state, run.task.batches(seed, at))
        losses.append(told["loss"])
        if at + 1 in ending:
            found[ending[at + 1]]["end"] = run.judged(state["params"])
        if at + 1 in branches:
            found[str(at + 1)]["plain"] = run.judged(state["params"])
        elif at + 1 in BETWEEN[run.name] and len(branches) > 1:
            found[str(at + 1)] = {"plain": run.judged(state["params"])}
    losses = [float(loss) for loss in jax.device_get(losses)]
    return {"lengths": found, "predictions": prequential(trainer.rows, losses, CONFIG)}


def full_run(run: Runner, seed: int, schedule: str, peak: float, total: int) -> dict[str, Any]:
    """A run that jumps and corrects, all within the cost of `total` steps."""
    # jumps and the end share the budget, which is what the end takes where that is more
    config = settings_for(total)
    real = min(int(total / (1 + config.probe_share)), total - taken(run, total))
    trainer, state = run.trainer(seed, config), run.state(seed, schedule, peak, real)
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
        "jumps": [[o.step, o.horizon, o.choice, o.kept, o.before, o.after] for o in trainer.outcomes],
        "calls": dict(trainer.calls),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not in the file yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--full", action="store_true", help="runs that jump on the way, too")
    given = parser.parse_args(argv)
    run = Runner(TASKS[given.task](given.data), given.task)
    lengths, between = LENGTHS[given.task], BETWEEN[given.task]
    result: dict[str, Any] = read_json(given.out) if given.out.exists() else {}
    settings = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(CONFIG).items()}
    settings["control_batches"] = {str(n): settings_for(n).control_batches for n in lengths}
    settings["screen_batches"] = {str(n): settings_for(n).screen_batches for n in lengths}
    same = {"task": given.task, "about": run.task.about, "settings": settings, "lengths": list(lengths)}
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

    middle = lengths[1]

    def tuned(part: str, runner: Runner, schedule: str) -> float:
        """The best rate; while it is the first or the last that was tried, one more is tried beyond."""
        tried: dict[float, float] = {}
        wanted = list(RATES[given.task])
        while wanted:
            for peak in wanted:
                make = partial(runner.plain, TUNING_SEED, schedule, peak, middle)
                tried[peak] = cell(part, f"{schedule} {peak:g}", make)
            best = min(tried, key=lambda peak: tried[peak])
            wanted = [best / 2] * (best == min(tried)) + [best * 2] * (best == max(tried))
        return best

    peaks = {schedule: tuned("tuning", run, schedule) for schedule in SCHEDULES}
    result["peaks"] = peaks
    for seed in SEEDS:
        for schedule in SCHEDULES:
            longest = max(between)
            runs = [(longest, lengths)] if schedule == "constant" else [(n, (n,)) for n in lengths]
            for total, branches in runs:
                name = f"{schedule} {total} seed {seed}"
                make: Any = partial(shared_run, run, seed, schedule, peaks[schedule], total, branches)
                cell("shared", name, make)
            for total in () if schedule == "constant" else between:
                make = partial(run.plain, seed, schedule, peaks[schedule], total)
                cell("plain", f"{schedule} {total} seed {seed}", make)
    for seed in SEEDS:
        for schedule in SCHEDULES:
            make = partial(move_quality, run, seed, schedule, peaks[schedule], middle)
            cell("moves", f"{schedule} seed {seed}", make)
    for seed in SEEDS:
        for length in lengths:
            make = partial(
                shared_run, run, seed, "cosine", peaks["cosine"], length, (length,), round(length / STOPPED)
            )
            cell("stopped cosine", f"cosine {length} seed {seed}", make)
    slow = peaks["wsd"] / 10
    for seed in SEEDS:
        name = f"wsd {middle} seed {seed}, a tenth of the rate"
        cell("undertuned", name, partial(shared_run, run, seed, "wsd", slow, middle, (middle,)))
    base = run.trained(TUNING_SEED, "wsd", peaks["wsd"], middle)["params"]
    tuning = Runner(with_lora(run.task, base), given.task)
    best = tuned("LoRA tuning", tuning, "wsd")
    for seed in SEEDS:
        name = f"wsd {middle} seed {seed}, LoRA"
        cell("LoRA", name, partial(shared_run, tuning, seed, "wsd", best, middle, (middle,)))
    result["peaks"]["LoRA"] = best
    write_json(given.out, result)
    if given.full:
        for length in reversed(lengths):
            for seed in SEEDS:
                for schedule in SCHEDULES:
                    name = f"{schedule} {length} seed {seed}"
                    cell("full", name, partial(full_run, run, seed, schedule, peaks[schedule], length))


if __name__ == "__main__":
    main()

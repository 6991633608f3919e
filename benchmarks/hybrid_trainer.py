"""Plain and watched runs of one configuration, through the trainer, with several seeds.

    python -m benchmarks.hybrid_trainer --data DIR --seeds 0 1 2 --out FILE [--train.num-epochs 6 ...]

DIR is a data folder whose embeddings exist. A watched run gives its control set away and is corrected at the
end, so there are three arms, which follow each other for every seed:

    plain    all training examples
    reduced  as plain, without the examples of the control set
    watched  configs/hybrid.yaml as it is: the examples of `reduced`, watched and corrected

The difference between the first two is what the control set costs in data; that between the last two is what
watching does. Without jumps both see the same batches in the same order. Figures: those of dev at the last
step and of the best checkpoint, and the CPU time of a step (its mean from step 12 on, without compiling,
validating and saving), which other programs on the machine disturb less than its time on the clock. What is
compiled is kept for the runs that follow, so the end of the first watched run took compiling, too.
"""

import argparse
import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import jax

from benchmarks.common import facts
from prime_jax.config import read_config
from prime_jax.data.control import CONTROL
from prime_jax.files import read_json, write_json
from prime_jax.train import loop
from prime_jax.train.__main__ import main as train
from prime_jax.train.hybrid import HybridRun
from prime_jax.train.monitor import History
from prime_jax.train.setup import prepared

CONFIG = Path(__file__).parents[1] / "configs" / "hybrid.yaml"
FIGURES = ("MRR@10", "unseen MRR@10", "R@5", "nDCG@10")
ARMS = ("plain", "reduced", "watched")
COMPILED = 12  # the first step after the first observation


def without_control(data: Path, out: Path, settings: list[str]) -> dict[str, int]:
    """Write the data folder less what a watched run sets aside, as lines of the same files."""
    given = ["--data.path", str(data), *settings, "--hybrid.enabled", "true"]
    splits = prepared(read_config(CONFIG, given)).data.splits
    control = set(splits[CONTROL].ids)
    kept = [line for line, name in _lines(data / "train.jsonl") if name not in control]
    (out / "train.jsonl").write_text("".join(kept), encoding="utf-8")
    for name in ("corpus.jsonl", "dev.jsonl"):
        (out / name).symlink_to((data / name).absolute())
    return {"examples_train": len(kept), "examples_control": len(control)}


def _lines(file: Path) -> list[tuple[str, str]]:
    return [(line, json.loads(line)["id"]) for line in file.read_text(encoding="utf-8").splitlines(True)]


def one_run(seed: int, arm: str, data: Path, settings: list[str]) -> dict[str, Any]:
    """Train once and read what the run left."""
    clock: list[float] = []
    ended: list[float] = []
    step, finish = loop._Run._step, HybridRun.finish

    def timed(run: Any, *given: Any) -> int:
        jax.block_until_ready(run.state)  # steps run on in the background, and would count where one waits
        clock.append(time.process_time())
        return step(run, *given)

    def timed_end(run: Any, *given: Any) -> Any:
        began = time.process_time()
        state = jax.block_until_ready(finish(run, *given))
        ended.append(time.process_time() - began)
        return state

    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(loop._Run, "_step", timed),
        patch.object(HybridRun, "finish", timed_end),
    ):
        run = Path(folder) / "run"
        options = ["--data.path", str(data), "--train.seed", str(seed), *settings]
        options += ["--hybrid.enabled", str(arm == "watched").lower()]
        if train(["--config", str(CONFIG), "--out", str(run), *options]):
            sys.exit(f"training with seed {seed} failed")
        rows = History(run, until_step=sys.maxsize, writing=False).rows
        report = read_json(run / "hybrid.json") if arm == "watched" else None
    judged = [row for row in rows if "MRR@10" in row]
    best = max(judged, key=lambda row: row["MRR@10"])
    ends = {row["step"] for row in judged}
    steps = [b - a for at, (a, b) in enumerate(pairwise(clock), 1) if at not in ends]
    found: dict[str, Any] = {
        "steps": judged[-1]["step"],
        "dev_last": _figures(judged[-1]),
        "dev_best": _figures(best),
        "best_step": best["step"],
        "cpu_seconds_per_step": fmean(steps[COMPILED:]),
    }
    if report is not None:
        found |= {
            "dev_as_trained": {name: judged[-1].get(f"as trained {name}") for name in FIGURES[:2]},
            "hybrid": report["totals"],
            "cpu_seconds_of_the_end": ended[0],
            "jumps": [row for row in report["rows"] if "after" in row],
        }
    return found


def _figures(row: Any) -> dict[str, float]:
    return {name: row[name] for name in FIGURES if name in row}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/hybrid_trainer.json"))
    given, settings = parser.parse_known_args()
    told = facts("jax", "flax", "optax", "numpy")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as compiled:
        jax.config.update("jax_compilation_cache_dir", compiled)
        reduced = Path(folder)
        written: dict[str, Any] = {
            "prime_jax": told["prime_jax"],
            "versions": told["versions"],
            "data": given.data.name,
            "settings": [word for word in settings if not word.startswith("--data.")],
            **without_control(given.data, reduced, settings),
            "runs": [],
        }
        for seed in given.seeds:
            for arm in given.arms:
                data = reduced if arm == "reduced" else given.data
                found = one_run(seed, arm, data, settings)
                written["runs"].append({"seed": seed, "arm": arm, **found})
                write_json(given.out, written)
                print(f"seed {seed}, {arm}: dev {found['dev_last']}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""Plain and watched runs of one configuration, through the trainer, with several seeds.

    python -m benchmarks.hybrid_trainer --data DIR --seeds 0 1 --out FILE [--train.num-epochs 6 ...]

DIR is a data folder whose embeddings exist. Both runs of a seed follow each other. The plain one learns from
all training examples, the watched one from those that its control set leaves. Figures: those of dev at the
last step and of the best checkpoint, the median time of a step, without validation and saving, and the CPU
time of the whole run with compiling, which other programs on the machine disturb less.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import facts
from prime_jax.config import load_stored_config
from prime_jax.files import read_json, write_json
from prime_jax.train.__main__ import main as train
from prime_jax.train.monitor import History

CONFIG = Path(__file__).parents[1] / "configs" / "hybrid.yaml"
FIGURES = ("MRR@10", "unseen MRR@10", "R@5", "nDCG@10")


def one_run(seed: int, enabled: bool, data: Path, settings: list[str]) -> dict[str, Any]:
    """Train once and read what the run left."""
    switch, began = str(enabled).lower(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        options = ["--data.path", str(data), "--train.seed", str(seed), *settings, "--hybrid.enabled", switch]
        if train(["--config", str(CONFIG), "--out", str(run), *options]):
            sys.exit(f"training with seed {seed} failed")
        cpu_seconds = time.process_time() - began
        batch = load_stored_config(run / "config.yaml").train.batch_size
        rows = History(run, until_step=sys.maxsize, writing=False).rows
        report = read_json(run / "hybrid.json") if enabled else None
    judged = [row for row in rows if "MRR@10" in row]
    logged = [row for row in rows if "loss" in row][1:]  # the first one holds the compiling
    best = max(judged, key=lambda row: row["MRR@10"])
    found: dict[str, Any] = {
        "steps": judged[-1]["step"],
        "dev_last": {name: judged[-1][name] for name in FIGURES if name in judged[-1]},
        "dev_best": {name: best[name] for name in FIGURES if name in best},
        "best_step": best["step"],
        "cpu_seconds": cpu_seconds,
        "step_ms": 1000 * batch / median(row["samples_per_second"] for row in logged),
    }
    if report is not None:
        jumps = [row for row in report["rows"] if "after" in row]
        found |= {
            "dev_as_trained": {name: judged[-1].get(f"as trained {name}") for name in FIGURES[:2]},
            "hybrid": report["totals"],
            "jumps": jumps,
            "watching_ms_per_step": logged[-1].get("hybrid_ms"),
        }
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--kinds", nargs="+", choices=("plain", "watched"), default=["plain", "watched"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/hybrid_trainer.json"))
    given, settings = parser.parse_known_args()
    told = facts("jax", "flax", "optax", "numpy")
    written: dict[str, Any] = {
        "prime_jax": told["prime_jax"],
        "versions": told["versions"],
        "data": given.data.name,
        "settings": settings,
        "runs": [],
    }
    for seed in given.seeds:
        for kind in given.kinds:
            enabled = kind == "watched"
            found = one_run(seed, enabled, given.data, settings)
            written["runs"].append({"seed": seed, "hybrid_enabled": enabled, **found})
            write_json(given.out, written)
            print(f"seed {seed}, {kind}: dev {found['dev_last']}", file=sys.stderr)


if __name__ == "__main__":
    main()

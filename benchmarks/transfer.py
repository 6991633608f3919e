"""Does the guard do no harm? Train on each set, judge on all of them, with and without the guard.

    python -m benchmarks.transfer --config configs/frozen.yaml --out FILE.json talks=DIR docs=DIR \
        hops=DIR,--data.context-from=search,--data.first-pass-k=5

Every set is a name, its data folder and settings of its own. The figures are those of dev. The set that a
model was trained on fitted its guard and its confidence, so its own confidence is judged on five folds of
whole conversations, each left out of the fit. Served answers are compared with the query and with what the
guard goes back to: the mix of query and turns that was tuned where the model was trained.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from benchmarks.common import facts
from benchmarks.study import METRICS, Figures, Opened, measured, opened, trained
from prime_jax import load
from prime_jax.config import read_config
from prime_jax.evaluate.reliability import reliability
from prime_jax.evaluate.significance import compare
from prime_jax.files import write_json
from prime_jax.models.confidence import Confidence, mix
from prime_jax.retrieval.vectors import unit
from prime_jax.train import calibration

FOLDS = 5


def means(figures: Figures) -> dict[str, float]:
    """Mean of every metric."""
    return {name: float(figures[name].mean()) for name in METRICS}


def left_out(confidence: Confidence, data: Opened, predicted: ndarray, found: Figures) -> ndarray:
    """The confidence of every query of dev, from a fit that has not seen its conversation."""
    dev, said = data.splits["dev"], np.zeros(len(predicted), np.float32)
    fold = np.random.default_rng(0).permutation(data.groups.max() + 1)[data.groups] % FOLDS
    for number in range(FOLDS):
        fitted, rest = fold != number, fold == number
        one = calibration.fit(
            dev.context[fitted],
            dev.mask[fitted],
            dev.query[fitted],
            predicted[fitted],
            hit=found["P@5"][fitted] > 0,
            gain=found["MRR@10"][fitted],
            groups=data.groups[fitted],
            query_centres=confidence.query_centres,
            answer_centres=confidence.answer_centres,
        )
        said[rest] = one.probability(dev.context[rest], dev.mask[rest], dev.query[rest], predicted[rest])
    return said


def judged(run: Path, home: str, sets: Mapping[str, Opened], plain: Mapping[str, Figures]) -> dict[str, Any]:
    """A trained run on every set."""
    predictor = load(run, precision="float32")
    confidence = predictor.confidence
    assert confidence is not None
    row: dict[str, Any] = {
        "strength": float(confidence.strength[0]),
        "fallback": confidence.fallback_mix._asdict(),
        "on": {},
    }
    for name, data in sets.items():
        dev = data.splits["dev"]
        predicted = predictor.predict(dev.context, dev.query, dev.mask)
        trust = confidence.trust(dev.query)
        fallback = confidence.fallback_mix(dev.context, dev.mask, dev.query)
        raw, served, fallen_back = (
            measured(vectors, data) for vectors in (predicted, mix(predicted, fallback, trust), fallback)
        )

        def against(other: Figures, served: Figures = served, data: Opened = data) -> dict[str, Any]:
            return {
                metric: compare(served[metric], other[metric], seed=0, groups=data.groups)._asdict()
                for metric in METRICS
            }

        row["on"][name] = {
            "query": means(plain[name]),
            "predicted": means(raw),
            "guarded": means(served),
            "fallback": means(fallen_back),
            "guarded_against_query": against(plain[name]),
            "guarded_against_fallback": against(fallen_back),
            "trust": float(trust.mean()),
        }
        if name == home and len(np.unique(data.groups)) >= FOLDS:
            said = left_out(confidence, data, predicted, raw)
            good = reliability(said, raw, plain[name], METRICS, seed=0)
            row["confidence"] = {
                "ece": good.ece,
                "ece_by_chance": good.ece_by_chance,
                "auc": good.auc,
                "brier": good.brier,
            }
            gain = {key: raw[key].mean() - plain[name][key].mean() for key in METRICS}
            kept = {key: served[key].mean() - plain[name][key].mean() for key in METRICS}
            row["gain_kept"] = {
                key: float(kept[key] / gain[key]) if gain[key] > 0 else None for key in METRICS
            }
        print(f"  on {name:12}", *(told(key, row["on"][name]) for key in ("P@5", "MRR@10")), flush=True)
    return row


def told(metric: str, row: Mapping[str, Any]) -> str:
    """Query, fallback, prediction and guarded prediction, and what the guarded one is worth."""
    names = ("query", "fallback", "predicted", "guarded")
    best, served = max(row["query"][metric], row["fallback"][metric]), row["guarded"][metric]
    change = f" ({served / best - 1:+.1%})" if best else ""
    return f"{metric}: " + " ".join(f"{name} {row[name][metric]:.3f}" for name in names) + change


def main(argv: Sequence[str] | None = None) -> None:
    """Train on each set in turn, and write what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--runs", type=Path, metavar="DIR", help="keep the runs, as DIR/NAME/SEED, and use those there"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("sets", nargs="+", metavar="NAME=DIR[,SETTING...]")
    given = parser.parse_args(argv)
    settings = {}
    for word in given.sets:
        name, _, rest = word.partition("=")
        folder, *own = rest.split(",")
        settings[name] = [f"--data.path={folder}", *own]
    sets = {name: opened(read_config(given.config, own), None) for name, own in settings.items()}
    plain = {name: measured(unit(data.splits["dev"].query), data) for name, data in sets.items()}
    found: dict[str, Any] = {"config": given.config.name, **facts("jax", "flax", "optax"), "trained_on": {}}
    for name, own in settings.items():
        for seed in given.seeds:
            with tempfile.TemporaryDirectory() as folder:
                run = (given.runs or Path(folder)) / name / str(seed)
                trained(read_config(given.config, [*own, f"--train.seed={seed}"]), run)
                print(f"trained on {name}, seed {seed}")
                row = judged(run, name, sets, plain)
            found["trained_on"].setdefault(name, {})[str(seed)] = row
            write_json(given.out, found)


if __name__ == "__main__":
    main()

"""Is the gain real where dev is small? Train without a fifth of train, judge on that fifth, five times.

    python -m benchmarks.folds --data DIR --config configs/recommended.yaml --out FILE.json

Whole conversations go into a fold. Checkpoints are chosen and baselines tuned on dev, as always, so nothing
of a fold has a say in what is judged on it. Figures are means over the seeds; comparisons are made query by
query over all folds together, on whole conversations.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from benchmarks.common import facts
from benchmarks.study import METRICS, Figures, compared, described, one_run, opened, tuned_rivals
from prime_jax.config import read_config
from prime_jax.data.records import load_dataset
from prime_jax.evaluate.run import conversations
from prime_jax.files import write_json, write_text


def fold_of(folder: Path, folds: int) -> ndarray:
    """The fold of every record of train, whole conversations in one."""
    labels = conversations(load_dataset(folder, ("train",)).splits["train"])
    numbers = np.random.default_rng(0).permutation(int(labels.max()) + 1) % folds
    return np.asarray(numbers[labels])


def without(folder: Path, left_out: ndarray, out: Path) -> Path:
    """A data folder like the given one, in which some records of train are the test split, each id once."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("corpus.jsonl", "dev.jsonl"):
        shutil.copyfile(folder / name, out / name)
    records = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    records = [record for record in records if record.strip()]
    ids = [json.loads(record)["id"] for record in records]
    first = np.array([ids.index(name) == at for at, name in enumerate(ids)])
    for name, kept in (("train", ~left_out), ("test", left_out & first)):
        write_text(out / f"{name}.jsonl", "".join(records[at] for at in np.flatnonzero(kept)))
    return out


def joined(parts: Sequence[Figures]) -> Figures:
    """The figures of all folds, one after the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in METRICS}


def main(argv: Sequence[str] | None = None) -> None:
    """Train on every fold's complement with every seed, and write what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep data and runs there, and go on with them"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    given = parser.parse_args(argv)
    fold, ours, theirs, about = fold_of(given.data, given.folds), [], [], []
    groups: list[ndarray] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(given.folds):
            place = (given.keep or Path(scratch)) / f"fold{number}"
            folder = without(given.data, fold == number, place / "data")
            store = f"--data.store={(given.keep or Path(scratch)) / 'embeddings'}"
            configs = [
                read_config(given.config, [f"--data.path={folder}", store, f"--train.seed={seed}"])
                for seed in given.seeds
            ]
            data = opened(configs[0], None, judged="test")
            runs = [one_run(config, data, place / str(config.train.seed)) for config in configs]
            mean = {name: np.mean([figures[name] for figures, _ in runs], axis=0) for name in METRICS}
            ours.append((mean, data))
            theirs.append(tuned_rivals(data))
            about.append({"queries": len(data.fresh), "runs": [told for _, told in runs]})
            groups.append(data.groups + (groups[-1].max() + 1 if groups else 0))
            print(f"fold {number}: MRR@10 {mean['MRR@10'].mean():.3f}", flush=True)
    fresh = np.concatenate([data.fresh for _, data in ours])
    whole = ours[0][1]._replace(fresh=fresh, groups=np.concatenate(groups))
    predicted = joined([mean for mean, _ in ours])
    rivals = {name: joined([figures[name] for _, figures in theirs]) for name in theirs[0][1]}
    result: dict[str, Any] = {
        "set": given.data.name,
        "queries": len(fresh),
        "unseen": int(fresh.sum()),
        "groups": int(whole.groups.max()) + 1,
        "seeds": given.seeds,
        "config": read_config(given.config, ["--data.path=."]).model_dump(mode="json", exclude={"data"}),
        "folds": about,
        "baselines": {
            name: {"settings": [settings[name] for settings, _ in theirs], **described(rivals[name], fresh)}
            for name in rivals
        },
        "predicted": described(predicted, fresh),
        "against": compared(predicted, rivals, whole),
        **facts("jax", "flax", "optax"),
    }
    write_json(given.out, result)
    for name, row in result["against"].items():
        print(f"against {name:18}", *(f"{m} {row[m]['difference']:+.3f} p {row[m]['p']:.4f}" for m in row))


if __name__ == "__main__":
    main()

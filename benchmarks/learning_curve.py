"""How many conversations are needed? Our predictors and their rivals, trained on more and more of the data.

    python -m benchmarks.learning_curve --data DIR --out FILE.json [--sizes 100 300 1000 3000]
        [--config FILE ...] [--seeds 0 1 2] [--only NAME ...] [--keep DIR]

Rows and options are those of `benchmarks.rivals`; every size has a table of its own, judged on dev, which
also chooses checkpoints and settings. A smaller part of train lies in every larger one, whole conversations
are in it or not, and so a part is as near to its size as they allow. FILE.png shows the curves. The table of
each size is written to the folder of --keep as its cells end, and the same command goes on from there.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from benchmarks.common import facts
from benchmarks.rivals import PACKAGES, filled, in_command, options_of, say, stored_in
from prime_jax.data.grouping import some_conversations
from prime_jax.data.records import Dataset, load_dataset, write_dataset
from prime_jax.errors import DataError
from prime_jax.files import atomic_path, write_json

SHOWN = ("MRR@10", "unseen MRR@10")


def part_data(dataset: Dataset, part: ndarray, out: Path) -> None:
    """Write a data folder with that part of train."""
    train = tuple(dataset.splits["train"][row] for row in np.flatnonzero(part))
    write_dataset(out, Dataset(dataset.corpus, {"train": train, "dev": dataset.splits["dev"]}))


def plot(curves: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw a figure of each method by the number of records, with 95% intervals."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    everything = [row["mean"] for curve in curves for row in curve["table"].values()]
    metrics = [name for name in SHOWN if all(name in means for means in everything)]
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(2.5 + 5 * len(metrics), 4), layout="constrained", squeeze=False
    )
    sizes = [curve["records"] for curve in curves]
    for axis, metric in zip(axes[0], metrics, strict=True):
        for method in curves[-1]["table"]:
            rows = [curve["table"].get(method) for curve in curves]
            known = [(size, row) for size, row in zip(sizes, rows, strict=True) if row is not None]
            x, y = [size for size, _ in known], [row["mean"][metric] for _, row in known]
            ends = np.array([row["interval"][metric] for _, row in known]).T
            (line,) = axis.plot(x, y, marker="o", label=method)
            axis.fill_between(x, *ends, color=line.get_color(), alpha=0.1)
        axis.set(xscale="log", xlabel="training examples", ylabel=metric)
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the tables lack, and draw the curves."""
    parser = options_of(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 300, 1000, 3000], metavar="N")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="the table of every size")
    in_command(parser, argv, _run)


def _run(given: argparse.Namespace, words: Sequence[str]) -> None:
    dataset = load_dataset(given.data, ("train", "dev"))
    train = dataset.splits["train"]
    if min(given.sizes) < 1:
        raise DataError("--sizes: a part has one record or more")
    curves: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        tables_in = given.keep or Path(scratch)
        for size in sorted({min(size, len(train)) for size in given.sizes}):
            part, folder = some_conversations(train, size), Path(scratch) / f"{size}"
            say(f"{part.sum():,} of {len(train):,} records")
            part_data(dataset, part, folder)
            table, _ = filled(
                given, stored_in(Path(scratch), words), folder, "dev", tables_in / f"{size}.json"
            )
            kept = ("queries", "unseen", "groups", "passages", "table", "ours", "against")
            curves.append({"records": int(part.sum()), **{name: table[name] for name in kept}})
            settings = {
                name: next(iter(seeds.values()))["settings"] for name, seeds in table["cells"].items()
            }
            result = {
                "set": given.data.resolve().name,
                "settings": settings,
                "curves": curves,
                **facts(*PACKAGES),
            }
            write_json(given.out, result)
    plot(curves, given.out.with_suffix(".png"))
    for curve in curves:
        for method, row in curve["table"].items():
            shown = (f"{metric} {row['mean'][metric]:.3f}" for metric in SHOWN if metric in row["mean"])
            print(f"{curve['records']:6,} {method:28}", *shown)


if __name__ == "__main__":
    main()

"""The one table of `rivals.py`: what finished cells say, with intervals, costs and paired significance."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy import ndarray

from benchmarks.rivals_methods import Cell
from benchmarks.study import METRICS, Figures, Opened, compared
from prime_jax.evaluate.significance import interval
from prime_jax.retrieval.metrics import DEPTH, ranking_metrics

Cells = Mapping[str, Mapping[str, Any]]  # of one method, by seed
COSTS = ("train_seconds", "ms", "ms_turns_kept", "mb")


def as_json(cell: Cell) -> dict[str, Any]:
    """A cell as it stands in the file; a ranking is one text of corpus rows, best first."""
    found = [" ".join(str(row) for row in rows if row >= 0) for rows in cell.found.tolist()]
    return {**cell._asdict(), "found": found}


def figures_of(cell: Mapping[str, Any], data: Opened) -> Figures:
    """Every metric of every query of a stored cell."""
    found = np.full((len(cell["found"]), DEPTH), -1, np.int64)
    for query, line in enumerate(cell["found"]):
        rows = [int(row) for row in line.split()]
        found[query, : len(rows)] = rows
    return ranking_metrics(found, data.judged.positives)


def mean_figures(cells: Cells, data: Opened) -> Figures:
    """Every metric of every query, the mean over the seeds."""
    seeds = [figures_of(cell, data) for cell in cells.values()]
    return {metric: np.mean([figures[metric] for figures in seeds], axis=0) for metric in METRICS}


def row_of(cells: Cells, data: Opened) -> dict[str, Any]:
    """One row: means over the seeds with their 95% intervals, each seed by itself, and costs."""
    mean, parts = mean_figures(cells, data), _parts(data)
    first = next(iter(cells.values()))
    return {
        "seeds": list(cells),
        "mean": _means(mean, parts),
        "interval": {
            f"{part}{metric}": _interval(mean[metric][rows], data.groups[rows])
            for part, rows in parts.items()
            for metric in METRICS
        },
        "per_seed": {seed: _means(figures_of(cell, data), parts) for seed, cell in cells.items()},
        "index_anew": first["index_anew"],
        **{cost: _mean_or_none([cell[cost] for cell in cells.values()]) for cost in COSTS},
    }


def against(ours: Mapping[str, Figures], rivals: Mapping[str, Figures], data: Opened) -> dict[str, Any]:
    """Each of ours against every rival: difference, interval and p, whole conversations as units."""
    if len(np.unique(data.groups[data.fresh])) < 2:  # too few to compare by themselves
        data = data._replace(fresh=np.zeros_like(data.fresh))
    return {name: compared(figures, rivals, data) for name, figures in ours.items()}


def markdown(table: Mapping[str, Mapping[str, Any]], ours: Sequence[str]) -> str:
    """The table as one reads it; ours in bold, the interval of MRR@10 beside it."""
    parts = ["", "unseen "] if any("unseen MRR@10" in row["mean"] for row in table.values()) else [""]
    names = [f"{part}{metric}" for part in parts for metric in METRICS]
    costs = ["training s", "index anew", "ms", "ms, turns kept", "MB"]
    lines = ["| " + " | ".join(["", *names, *costs]) + " |", "|---" * (1 + len(names) + len(costs)) + "|"]
    for method, row in table.items():
        cells = [f"**{method}**" if method in ours else method]
        for name in names:
            ends = row["interval"][name] if name.endswith("MRR@10") else None
            cells.append(f"{row['mean'][name]:.3f}" + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else ""))
        cells += [f"{row['train_seconds']:.0f}", "yes" if row["index_anew"] else "no"]
        cells += ["" if row[cost] is None else f"{row[cost]:.1f}" for cost in COSTS[1:]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _parts(data: Opened) -> dict[str, ndarray]:
    """The queries that are averaged: all, and those with unseen answers where there are any."""
    parts = {"": np.ones(len(data.fresh), bool)}
    return parts | {"unseen ": data.fresh} if data.fresh.any() else parts


def _means(figures: Figures, parts: Mapping[str, ndarray]) -> dict[str, float]:
    return {
        f"{part}{metric}": float(figures[metric][rows].mean())
        for part, rows in parts.items()
        for metric in METRICS
    }


def _interval(values: ndarray, groups: ndarray) -> tuple[float, float] | None:
    """The 95% interval; None where there is no more than one conversation."""
    return interval(values, seed=0, groups=groups) if len(np.unique(groups)) > 1 else None


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None

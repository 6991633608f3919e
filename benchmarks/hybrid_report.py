"""From the files of `hybrid.py`: steps saved, prediction quality, moves beside their ceiling; a plot.

    python -m benchmarks.hybrid_report benchmarks/results/hybrid_lm.json ... --out benchmarks/results

Where `end` kept nothing, its run is the plain one but for the steps that were spent on finding that out:
steps saved are minus that cost over the length, by definition. Where something was kept they are 1 - T / T',
where T and T' are the lengths at which plain training of the same schedule and seed reaches the validation
loss of the plain run and that of the method, which cost the same: read off its losses at several lengths,
made falling, linear in the logarithm of the length between them. Where a loss is below all of them, T' is the
longest length and the figure a lower bound; where the losses are nearly flat, small differences are many
steps, and the losses themselves say more. Losses that differ by less than 0.0001 count as equal.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.hybrid_quality import AHEAD
from prime_jax.files import read_json, write_json

SCHEDULES = ("constant", "wsd", "cosine")
SAME = 1e-4  # a difference of losses that is none
HORIZONS = ("5", "10", "25", "50")


def curve(result: Mapping[str, Any], schedule: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and validation losses of plain runs, lengths rising and losses falling."""
    points: dict[int, float] = {}
    for name, value in result.get("plain", {}).items():
        if name.startswith(f"{schedule} ") and name.endswith(f" seed {seed}"):
            points[int(name.split()[1])] = value
    for name, run in result["shared"].items():
        if name.startswith(f"{schedule} ") and name.endswith(f" seed {seed}"):
            points |= {int(length): cell["plain"] for length, cell in run["lengths"].items()}
    lengths = sorted(points)
    return np.array(lengths, float), np.minimum.accumulate([points[length] for length in lengths])


def steps_for(loss: float, lengths: np.ndarray, losses: np.ndarray) -> float:
    """Length at which plain training first reaches a loss."""
    reached = np.flatnonzero(losses <= loss)
    if not len(reached):
        return float(lengths[-1])
    after = max(1, int(reached[0]))  # before the first point the first segment goes on
    x, y = np.log(lengths[after - 1 : after + 1]), losses[after - 1 : after + 1]
    if y[0] == y[1]:
        return float(lengths[after - 1])
    return float(math.exp(x[0] + (x[1] - x[0]) * (y[0] - loss) / (y[0] - y[1])))


def saved(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Per schedule and length: losses of all methods, and the share of steps saved, one value per seed."""
    found: dict[str, dict[str, Any]] = {}
    seeds = sorted({int(name.split()[-1]) for name in result["shared"]})
    for schedule in SCHEDULES:
        for length in result["lengths"]:
            cell: dict[str, Any] = {}
            for seed in seeds:
                run = next(
                    (
                        run["lengths"]
                        for name, run in result["shared"].items()
                        if name.startswith(f"{schedule} ")
                        and name.endswith(f"seed {seed}")
                        and "end" in run["lengths"].get(str(length), {})
                    ),
                    None,
                )
                if run is None:
                    continue
                lengths, losses = curve(result, schedule, seed)
                one = run[str(length)]
                losses_of = {"plain": one["plain"], "end": one["end"]}
                full = result.get("full", {}).get(f"{schedule} {length} seed {seed}")
                if full:
                    losses_of["full"] = full["full"]
                for method, loss in losses_of.items():
                    cell.setdefault(method, []).append(loss)
                    if method != "plain":
                        if abs(loss - one["plain"]) < SAME:
                            loss = one["plain"]
                        needed = steps_for(one["plain"], lengths, losses)
                        share = 1 - needed / steps_for(loss, lengths, losses)
                        if method == "end" and not one["kept"]:
                            share = -one["cost"] / length
                        cell.setdefault(f"{method} saved", []).append(share)
                cell.setdefault("beyond", []).append(bool(one["end"] < losses[-1] - SAME))
                for name in ("choice", "kept", "cost", "control_gain"):
                    cell.setdefault(name, []).append(one[name])
            if cell:
                found[f"{schedule} {length}"] = cell
    return found


def predictions(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Per run: R2, skill and coverage at each horizon."""
    return {name: run["predictions"] for name, run in result["shared"].items()}


def moves(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Per number of steps ahead: mean cosines over all runs and states."""
    found: dict[str, dict[str, float]] = {}
    for steps in map(str, AHEAD):
        runs = [run[steps] for run in result.get("moves", {}).values()]
        if runs:
            cell = {name: float(np.mean([value for run in runs for value in run[name]])) for name in runs[0]}
            cell["head over root of ceiling"] = cell["head"] / math.sqrt(max(cell["ceiling"], 1e-12))
            found[steps] = cell
    return found


def others(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows that are not comparisons with a tuned baseline, labelled as what they are."""
    found: dict[str, dict[str, Any]] = {}
    for part in ("undertuned", "LoRA"):
        for name, run in result.get(part, {}).items():
            ((length, cell),) = run["lengths"].items()
            found[name] = {"steps": int(length), **cell}
    return found


def stopped(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Cosines planned for more steps, stopped and corrected, beside the plain cosine of that length."""
    found: dict[str, dict[str, Any]] = {}
    for name, run in result.get("stopped cosine", {}).items():
        ((length, one),) = run["lengths"].items()
        lengths, losses = curve(result, "cosine", int(name.split()[-1]))
        plain = float(losses[list(lengths).index(float(length))])
        cell = found.setdefault(f"cosine {length}", {})
        told = {"plain": plain, "stopped plain": one["plain"], "end": one["end"]}
        told |= {name: one[name] for name in ("choice", "kept", "cost")}
        needed = steps_for(plain, lengths, losses)
        for saved_by, loss in (("end saved", one["end"]), ("stopped saved", one["plain"])):
            told[saved_by] = 1 - needed / steps_for(loss, lengths, losses)
        told["beyond"] = bool(one["end"] < losses[-1] - SAME)
        for name, value in told.items():
            cell.setdefault(name, []).append(value)
    return found


def table(summary: Mapping[str, Any], part: str = "saved") -> list[str]:
    """Markdown rows of steps saved."""
    lines = []
    for task, parts in summary.items():
        for name, cell in parts[part].items():
            plain, end = np.array(cell["plain"]), np.array(cell["end"])
            share = np.array(cell["end saved"])
            sign = "≥ " if any(cell["beyond"]) else ""
            full = f"{np.mean(cell['full saved']):+.1%}" if "full saved" in cell else "-"
            kept = ", ".join(
                choice if stays else f"({choice})"
                for choice, stays in zip(cell["choice"], cell["kept"], strict=True)
            )
            lines.append(
                f"| {task} | {name} | {plain.mean():.4f} | {end.mean():.4f} | {sign}{share.mean():+.1%} "
                f"({share.min():+.1%} to {share.max():+.1%}) | {full} | {kept} |"
            )
    return lines


def prediction_table(summary: Mapping[str, Any]) -> list[str]:
    """Markdown rows of loss predictions: means over seeds for each schedule, length and horizon."""
    lines = []
    for task, part in summary.items():
        groups: dict[str, list[Any]] = {}
        for name, run in part["predictions"].items():
            groups.setdefault(name.split(" seed")[0], []).append(run)
        for name, runs in groups.items():
            for steps in HORIZONS[1:]:

                def over(score: str, runs: list[Any] = runs, steps: str = steps) -> np.ndarray:
                    return np.array([run[steps][score] for run in runs])

                coverage = over("coverage")
                scores = ("R2", "R2 possible", "R2 of a step", "skill", "skill of a linear trend")
                cells = " | ".join(f"{over(score).mean():.2f}" for score in scores)
                lines.append(
                    f"| {task} | {name} | {steps} | {cells} | {coverage.min():.2f} to {coverage.max():.2f} |"
                )
    return lines


def move_table(summary: Mapping[str, Any]) -> list[str]:
    """Markdown rows of cosines with true moves."""
    return [
        f"| {task} | {steps} | {cell['head']:.2f} | {cell['direction']:.2f} | {cell['last move']:.2f} | "
        f"{cell['ceiling']:.2f} | {cell['head over root of ceiling']:.2f} |"
        for task, part in summary.items()
        for steps, cell in part["moves"].items()
    ]


def plot(summary: Mapping[str, Any], file: Path) -> None:
    """Steps saved, loss prediction and moves, one column per task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(summary), 10), layout="constrained")
    panels = np.atleast_2d(figure.subplots(3, len(summary), squeeze=False))
    for column, (task, part) in enumerate(summary.items()):
        above, middle, below = panels[:, column]
        names = list(part["saved"])
        for at, name in enumerate(names):
            cell = part["saved"][name]
            for method, colour, shift in (("end", "C0", -0.12), ("full", "C1", 0.12)):
                shares = [100 * share for share in cell.get(f"{method} saved", [])]
                if not shares:
                    continue
                above.plot(
                    [at + shift] * len(shares), shares, ".", color=colour, label=None if at else method
                )
                above.plot(at + shift, np.mean(shares), "_", color=colour, markersize=14)
        above.axhline(0, color="grey", linewidth=0.8)
        above.set(title=f"{task}: steps saved at equal loss", ylabel="% of plain steps")
        above.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
        above.legend(frameon=False)
        for score, mark in (("R2", "o-"), ("R2 possible", "^:"), ("skill", "s-")):
            values = [[run[y][score] for y in HORIZONS] for run in part["predictions"].values()]
            middle.plot(HORIZONS, np.median(values, axis=0), mark, label=f"{score} (median)")
        line = [[r[y]["skill of a linear trend"] for y in HORIZONS] for r in part["predictions"].values()]
        middle.plot(HORIZONS, np.median(line, axis=0), "x--", color="grey", label="skill of a line (median)")
        middle.axhline(0, color="grey", linewidth=0.8)
        middle.set(title="Loss of a window, told beforehand", xlabel="steps ahead", ylim=(-1.5, 1.05))
        middle.legend(frameon=False, fontsize=8)
        told = part["moves"]
        for name in ("head", "direction", "last move", "ceiling"):
            below.plot(list(told), [told[y][name] for y in told], "o-", label=name)
        if told:
            root = [math.sqrt(max(told[y]["ceiling"], 0)) for y in told]
            below.plot(list(told), root, ":", color="grey", label="root of the ceiling")
            below.legend(frameon=False, fontsize=8)
        below.set(title="Cosine with the true move", xlabel="steps ahead")
    figure.savefig(file, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Write hybrid_summary.json and hybrid.png, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    given = parser.parse_args(argv)
    summary: dict[str, Any] = {}
    for file in given.files:
        result = read_json(file)
        summary[result["task"]] = {
            "saved": saved(result),
            "predictions": predictions(result),
            "moves": moves(result),
            "others": others(result),
            "stopped": stopped(result),
        }
    write_json(given.out / "hybrid_summary.json", summary)
    plot(summary, given.out / "hybrid.png")
    rows = [
        *table(summary),
        "",
        *table(summary, "stopped"),
        "",
        *prediction_table(summary),
        "",
        *move_table(summary),
    ]
    print("\n".join(rows))


if __name__ == "__main__":
    main()

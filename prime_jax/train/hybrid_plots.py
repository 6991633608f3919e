"""hybrid.png: the loss with the phases shaded, predicted against real loss, horizons chosen, confidence."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prime_jax.files import atomic_path
from prime_jax.train.monitor import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WARM, _KEPT, _REFUSED, _WRONG = "0.9", "tab:green", "0.6", "tab:red"


def plot_hybrid(rows: Sequence[Row], horizons: Sequence[int], file: Path) -> bool:
    """Draw a watched run.

    Args:
        rows: Of `HybridTrainer`.
        horizons: Those above 0.
        file: The picture, PNG.

    Returns:
        Whether it was drawn; without matplotlib (extra `plots`), or before the first observation, it is not.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    seen = [row for row in rows if row.get("loss") is not None]
    if not seen:
        return False
    figure = Figure(figsize=(13, 8), layout="constrained")
    losses, chosen, near, far = figure.subplots(2, 2).ravel()
    _losses(losses, rows, seen)
    _choices(chosen, rows, seen, horizons)
    for axes, steps in ((near, horizons[0]), (far, horizons[-1])):
        _predictions(axes, seen, steps)
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return True


def _losses(axes: "Axes", rows: Sequence[Row], seen: Sequence[Row]) -> None:
    steps = [row["step"] for row in seen]
    axes.plot(steps, [row["loss"] for row in seen], lw=1.2, label="training loss (mean of a window)")
    warm = [row["step"] for row in seen if row["phase"] == "WARMUP"]
    if warm:
        axes.axvspan(0, max(warm), color=_WARM, lw=0, label="warming up")
    jumps = [row for row in rows if row.get("horizon") and "after" in row]
    for kept, colour, label in ((True, _KEPT, "jump kept"), (False, _REFUSED, "jump refused")):
        for number, row in enumerate(row for row in jumps if row["kept"] is kept):
            axes.axvline(row["step"], color=colour, lw=1.2, alpha=0.7, label=None if number else label)
    ends = [row for row in rows if row.get("horizon") == 0 and "after" in row]
    if ends:
        end = ends[-1]
        what, colour = ("kept", _KEPT) if end["kept"] else ("not kept", _REFUSED)
        _points(axes, [end], "before", "o", "control loss at the end, as trained", mfc="none")
        _points(axes, [end], "after", "o", f"control loss at the end, {end['choice']}, {what}", mfc=colour)
    for number, row in enumerate(row for row in rows if "rollback" in str(row.get("actions", "")).lower()):
        axes.axvline(row["step"], color=_WRONG, ls=":", label=None if number else "went back")
    _finish(axes, "Loss, with the phases", "nats")


def _choices(axes: "Axes", rows: Sequence[Row], seen: Sequence[Row], horizons: Sequence[int]) -> None:
    """What was chosen where a jump could be afforded, and how sure the predictor was."""
    picked = [row for row in seen if "horizon" in row]
    axes.plot(
        [row["step"] for row in picked],
        [row["horizon"] for row in picked],
        ".",
        color="0.3",
        ms=5,
        label="horizon chosen (0: no jump)",
    )
    for kept, colour, label in ((True, _KEPT, "jump kept"), (False, _REFUSED, "jump refused")):
        jumps = [row for row in rows if row.get("horizon") and row.get("kept") is kept and "after" in row]
        if jumps:
            _points(axes, jumps, "horizon", "D", label, mfc=colour, ms=8)
    _finish(axes, "Horizon choices and confidence", "steps ahead")
    axes.set(ylim=(-0.07 * horizons[-1], 1.45 * horizons[-1]), yticks=(0, *horizons))
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    sure = axes.twinx()
    for steps in horizons:
        known = [row for row in seen if row.get(f"confidence_{steps}") is not None]
        at = [row["step"] for row in known]
        sure.plot(at, [row[f"confidence_{steps}"] for row in known], lw=1, label=f"{steps} steps")
    sure.set(ylabel="confidence (lines)", ylim=(-0.07, 1.45), yticks=(0, 0.25, 0.5, 0.75, 1))
    sure.spines[["top"]].set_visible(False)
    sure.legend(frameon=False, fontsize=8, loc="upper right", ncols=2, title="confidence", title_fontsize=8)


def _predictions(axes: "Axes", seen: Sequence[Row], steps: int) -> None:
    """What was said `steps` before, with one-sigma intervals, beside what came."""
    axes.plot(
        [row["step"] for row in seen], [row["loss"] for row in seen], color="0.4", lw=1.2, label="real loss"
    )
    said = [row for row in seen if row.get(f"predicted_{steps}") is not None and row["phase"] != "WARMUP"]
    said = [row for row in said if row["step"] + steps <= seen[-1]["step"]]
    if said:
        at = [row["step"] + steps for row in said]
        mean = [row[f"predicted_{steps}"] for row in said]
        sigma = [row[f"sigma_{steps}"] or 0.0 for row in said]
        axes.plot(at, mean, color="tab:orange", lw=1, label=f"predicted {steps} steps before")
        low = [m - s for m, s in zip(mean, sigma, strict=True)]
        high = [m + s for m, s in zip(mean, sigma, strict=True)]
        axes.fill_between(at, low, high, color="tab:orange", alpha=0.25, lw=0, label="one sigma")
        real = [row["loss"] for row in seen if row["step"] >= at[0]]
        room = 0.5 * (max(real) - min(real)) + 1e-6
        axes.set(xlim=(at[0] - 1, at[-1] + 1), ylim=(min(real) - room, max(real) + room))
    _finish(axes, f"Predicted and real loss, {steps} steps ahead", "nats")


def _points(axes: "Axes", rows: Sequence[Row], name: str, marker: str, label: str, **style: Any) -> None:
    axes.plot(
        [row["step"] for row in rows],
        [row[name] for row in rows],
        marker,
        label=label,
        mec="0.2",
        **{"ms": 7, **style},
    )


def _finish(axes: "Axes", title: str, unit: str) -> None:
    axes.set(title=title, xlabel="step", ylabel=unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(framealpha=0.85, edgecolor="none", fontsize=8)

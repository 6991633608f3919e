"""steering.png: losses of a steered run, who was steered how, what the router does, and signs of collapse."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prime_jax.data.steered import LEAKY, VARIANTS, ZERO
from prime_jax.files import atomic_path
from prime_jax.losses.jasper import COMPONENTS, ROUTING_COMPONENTS
from prime_jax.train.monitor import History, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHARES = (ZERO, *VARIANTS)


def plot_steering(history: History, plain_query: float, file: Path) -> bool:
    """Draw the history of a steered run.

    Args:
        history: Of the run.
        plain_query: MRR@10 of a search with the question itself.
        file: The picture, PNG.

    Returns:
        Whether it was drawn; without matplotlib (extra `plots`) it is not.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    training = [row for row in history.rows if "total" in row]
    judged = [row for row in history.rows if "MRR@10" in row]
    if not training:
        return False
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    losses, shares, retrieval, router, schedules, gauges = figure.subplots(2, 3).ravel()
    _losses(losses, training)
    _shares(shares, training)
    for variant in _SHARES:
        dashed = "--" if variant in LEAKY else "-"
        label = f"{variant} (leaks the answer)" if variant in LEAKY else variant
        _line(retrieval, judged, f"{variant} MRR@10", label, style=dashed)
    retrieval.axhline(plain_query, ls=":", color="grey", label="plain question")
    _finish(retrieval, "MRR@10 on dev, by steering")
    for name in ("routing_entropy", "entropy_target", "router_usage", "routing_accuracy"):
        _line(router, training, name, name.replace("_", " "))
    _line(router, judged, "routing accuracy", "routing accuracy, dev", style="o-")
    _line(router, judged, "cluster accuracy", "cluster of the prediction, dev", style="o-")
    _finish(router, "Router and clusters")
    _line(schedules, training, "gumbel_temperature", "Gumbel temperature")
    _finish(schedules, "Schedules")
    if any("ema_decay" in row for row in training):
        right = schedules.twinx()
        _line(right, training, "ema_decay", "EMA decay (tau), right", style="--")
        right.legend(frameon=False, fontsize=8, loc="lower right")
    for name in ("spread", "mean_length", "vicreg_variance", "atypicality"):
        _line(gauges, training, name, name.replace("_", " "))
    _finish(gauges, "Signs of collapse")
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return True


def _losses(axes: "Axes", rows: Sequence[Row]) -> None:
    _line(axes, rows, "loss", "contrastive (InfoNCE)")
    for name in (*COMPONENTS[1:], *ROUTING_COMPONENTS):
        _line(axes, rows, name, name)
    axes.set_yscale("symlog", linthresh=0.1)
    _finish(axes, "Losses, unweighted")


def _shares(axes: "Axes", rows: Sequence[Row]) -> None:
    shown = [name for name in _SHARES if any(row.get(f"steering_{name}") for row in rows)]
    epochs = [row["epoch"] for row in rows]
    axes.stackplot(epochs, *([row[f"steering_{name}"] for row in rows] for name in shown), labels=shown)
    axes.set(ylim=(0, 1), xlim=(min(epochs), max(max(epochs), min(epochs) + 1e-6)))
    _finish(axes, "Steering in training")
    axes.legend(fontsize=8, loc="lower left")


def _line(axes: "Axes", rows: Sequence[Row], name: str, label: str, style: Any = "-") -> None:
    known = [row for row in rows if name in row]
    if known:
        axes.plot([row["epoch"] for row in known], [row[name] for row in known], style, label=label, ms=3)


def _finish(axes: "Axes", title: str) -> None:
    axes.set(title=title, xlabel="epoch")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8)

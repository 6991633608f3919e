"""The pictures of an evaluation: a metric of every method with 95% intervals, and found-within-k curves.

Needs matplotlib (`pip install "prime-jax[plots]"`), imported only here and only when a picture is drawn.
"""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prime_jax import files
from prime_jax.errors import PredictorError
from prime_jax.evaluate.evaluation import DEPTH, PREDICTED, Evaluation
from prime_jax.evaluate.reliability import COVERAGE
from prime_jax.retrieval.metrics import first_rank

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ACCENT, _SECOND, _GREY = "#2f7ed8", "#d9822b", "#9aa0a6"  # readable on white and on black
_INK = "#010203"  # in SVG replaced by the colour of the page's text
JUDGED = ("What was said, and what was found", "P@5 when only confident predictions are used")
"""Captions of the pictures of confidence."""
_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
}


def found_within(evaluation: Evaluation, method: str) -> np.ndarray:
    """Share of queries with a right passage among the first k, for k = 1 .. `DEPTH`."""
    rank = first_rank(evaluation.methods[method].indices, evaluation.test.positives)
    return np.cumsum(np.bincount(rank[rank > 0] - 1, minlength=DEPTH)) / len(rank)


def figures(evaluation: Evaluation) -> dict[str, str]:
    """Inline SVG of each picture by its caption; colours follow the text colour of the page around it.

    Raises:
        PredictorError: If matplotlib is not installed.
    """
    drawn = {
        "MRR@10 with 95% intervals": _svg(evaluation, _bars),
        "Questions with a right passage within the first k": _svg(evaluation, _curve),
    }
    if evaluation.reliability is not None:
        drawn |= {
            caption: _svg(evaluation, draw)
            for caption, draw in zip(JUDGED, (_reliability, _selective), strict=True)
        }
    return drawn


def figure_result(evaluation: Evaluation, path: Path) -> None:
    """Save the bars and the curve side by side as a PNG on white, for a README.

    Raises:
        PredictorError: If matplotlib is not installed.
    """
    pyplot_figure = _figure_class()
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        figure = pyplot_figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        _bars(left, evaluation)
        left.set_title("MRR@10, with 95% intervals", fontsize=11)
        _curve(right, evaluation)
        with files.atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150, facecolor="white")


def _figure_class() -> "type[Figure]":
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PredictorError('pictures need matplotlib: pip install "prime-jax[plots]"') from None
    return Figure


def _svg(evaluation: Evaluation, draw: "Callable[[Axes, Evaluation], None]") -> str:
    figure_class = _figure_class()
    import matplotlib as mpl

    ink: dict[Any, Any] = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK
    )
    with mpl.rc_context({**_STYLE, **ink, "svg.hashsalt": draw.__name__}):
        figure = figure_class(figsize=(5.2, 3.9), layout="constrained")
        draw(figure.subplots(), evaluation)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows SVG without them
    return svg.replace(_INK, "currentColor")


def _colour(evaluation: Evaluation, method: str) -> str:
    return {PREDICTED: _ACCENT, evaluation.best_baseline: _SECOND}.get(method, _GREY)


def _bars(axes: "Axes", evaluation: Evaluation) -> None:
    metric = "MRR@10"
    names = sorted(evaluation.methods, key=lambda name: evaluation.methods[name].mean(metric))
    means = np.array([evaluation.methods[name].mean(metric) for name in names])
    ends = np.array([evaluation.methods[name].intervals[metric] for name in names])
    # A percentile interval may miss the mean by a rounding error; a negative bar length is refused.
    lengths = np.maximum(np.abs(ends - means[:, None]).T, 0)
    axes.barh(
        names,
        means,
        xerr=lengths,
        color=[_colour(evaluation, name) for name in names],
        error_kw={"ecolor": axes.spines["left"].get_edgecolor(), "elinewidth": 1, "capsize": 3},
        height=0.7,
    )
    for place, (mean, end) in enumerate(zip(means, ends, strict=True)):
        axes.annotate(
            f"{mean:.3f}", (end[1], place), (6, 0), textcoords="offset points", va="center", fontsize=10
        )
    axes.margins(x=0.15)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(left=0)


def _curve(axes: "Axes", evaluation: Evaluation) -> None:
    within = np.arange(1, DEPTH + 1)
    shown = [PREDICTED, evaluation.best_baseline]
    shown += ["query"] if "query" not in shown else []
    for name in shown:
        axes.plot(within, found_within(evaluation, name), color=_colour(evaluation, name), label=name, lw=2)
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    axes.minorticks_off()
    axes.set_xlim(1, DEPTH)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("k, the number of passages looked at")
    axes.set_ylabel("questions with a right one")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="best")


def _reliability(axes: "Axes", evaluation: Evaluation) -> None:
    found = evaluation.reliability
    assert found is not None
    around = 1.96 * np.sqrt(np.maximum(found.found * (1 - found.found), 0) / found.counts)
    low, high = np.maximum(found.found - around, 0), np.minimum(found.found + around, 1)
    axes.plot([0, 1], [0, 1], color=_GREY, lw=1, ls="--", label="calibrated")
    axes.errorbar(
        found.said,
        found.found,
        yerr=np.stack([found.found - low, high - found.found]),
        color=_ACCENT,
        marker="o",
        lw=2,
        elinewidth=1,
        capsize=3,
        label="predicted",
    )
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("confidence")
    axes.set_ylabel("with a right passage in the first 5")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="upper left")


def _selective(axes: "Axes", evaluation: Evaluation) -> None:
    found = evaluation.reliability
    assert found is not None
    axes.plot(COVERAGE, found.selective["P@5"], color=_ACCENT, lw=2, label="all, with the query for the rest")
    axes.plot(COVERAGE, found.confident["P@5"], color=_SECOND, lw=2, label="the confident predictions alone")
    axes.axhline(found.selective["P@5"][0], color=_GREY, lw=1, ls="--", label="query")
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("predictions used, the most confident first")
    axes.set_ylabel("P@5")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="best")

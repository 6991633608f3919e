"""How long one prediction takes, beside peers on the same machine, weights and requests.

    python -m benchmarks.latency --out benchmarks/results

Times the default 206M model with ten turns: our `predict` and our causal session in each dtype, PyTorch eager
and compiled, ONNX Runtime on the exported file and its int8 version. Every contender has a process of its
own; all start side by side and then take turns, a few calls each, for many rounds, so that a slow minute of
the machine hits all alike. Beside them stands the floor: the time to read the weights once, and to do the
products, at the rates measured here. Writes latency_<device>.json (anew after every round) and .png.

On a machine with an NVIDIA GPU all but ONNX Runtime run there, also at batch 256, and `device_ms` says how
long the bare program takes there, inputs and answer on the device. `--seconds` bounds the whole: contenders
that are not ready in time are left out, and rounds end in time.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.table import Table

from benchmarks.common import facts
from benchmarks.contenders import CONTENDERS, ON_CPU, ON_GPU, OURS, TINY, TURNS, serve
from benchmarks.floor import SIZE, floor, operations, rates
from benchmarks.side_by_side import Contender, ContenderError, Entry, start
from prime_jax.export.quantize import quantize
from prime_jax.export.to_onnx import to_onnx
from prime_jax.files import write_json
from prime_jax.models.prime import PredictorConfig
from prime_jax.models.state_dict import state_dict
from prime_jax.progress import console, progress

CALLS = {1: 5, 8: 3, 32: 2, 256: 2}  # in a row, each round
GPU_CALLS, GPU_UNRECORDED, DEVICE_RUNS = 25, 5, 200  # there a call takes a millisecond
READY_BY, TIMED_BY = 0.7, 0.9  # shares of --seconds
EXACT = ("predict float32", "PyTorch eager float32")  # the first that is there is what cosines are taken to
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "onnxruntime")


def write_model(folder: Path, config: PredictorConfig, *, onnx: bool) -> None:
    """The same random weights for everyone: config.json, model.safetensors and, on CPUs, two ONNX files."""
    from safetensors.numpy import save_file

    model = config.build(rngs=nnx.Rngs(0))
    save_file(state_dict(model), folder / "model.safetensors")
    write_json(folder / "config.json", {"model": config.model_dump()})
    if not onnx:
        return
    to_onnx(model, folder / "model.onnx")
    quantize(folder / "model.onnx", folder / "model.int8.onnx", "int8")


class Study:
    """Contenders that run, and what they answered and took so far.

    Args:
        folder: The weights.
        names: Which contenders.
        batches: Which batch sizes.
        seconds: Within so long they must be ready; None means that all are waited for.
    """

    def __init__(self, folder: Path, names: tuple[str, ...], batches: tuple[int, ...], seconds: float | None):
        self.batches = batches
        self.gpu = jax.default_backend() == "gpu"
        entries = {  # ours compile in turn, on CPUs so that their memory does not peak together
            name: Entry(serve, (name, folder, batches), alone=name.startswith(OURS)) for name in names
        }
        self._ready, failed = start(entries, seconds)
        self.results: dict[str, Any] = {
            name: {"not_measured": failed[name]}
            if name in failed
            else {"answers": self._ready[name].told, "seconds": {batch: [] for batch in batches}}
            for name in names
        }

    def time_round(self) -> None:
        """A few calls of every contender at every batch size."""
        for batch in self.batches:
            for name, contender in list(self._ready.items()):
                times, unrecorded = (GPU_CALLS, GPU_UNRECORDED) if self.gpu else (CALLS[batch], 0)
                taken = self._ask(name, contender, ("call", batch, times, unrecorded))
                if taken is not None:
                    self.results[name]["seconds"][batch] += taken

    def time_on_device(self) -> None:
        """The bare programs of those contenders that have one."""
        for name, contender in list(self._ready.items()):
            found = {}
            for batch in self.batches:
                runs = DEVICE_RUNS if self.gpu else CALLS[batch]
                found[batch] = self._ask(name, contender, ("device", batch, runs))
            if "answers" in self.results[name]:
                self.results[name]["device"] = found

    def end(self) -> None:
        """Collect what each used, and end it."""
        for name, contender in list(self._ready.items()):
            memory = self._ask(name, contender, None)
            if memory is not None:
                self.results[name]["memory"] = memory
            contender.end()

    def _ask(self, name: str, contender: Contender, order: Any) -> Any:
        if name not in self._ready:
            return None
        try:
            return contender.ask(order)
        except ContenderError as gone:
            del self._ready[name]
            self.results[name] = {"not_measured": f"while it was timed: {gone}"}
            return None


def summarise(results: dict[str, Any], batches: tuple[int, ...], floors: dict[int, Any]) -> dict[str, Any]:
    """p50, p95, ratio to our fastest predict and agreement with float32, by batch size."""
    figures: dict[str, Any] = {}
    exact = next((name for name in EXACT if "answers" in results.get(name, {})), None)
    for batch in batches:
        medians = {
            name: statistics.median(result["seconds"][batch])
            for name, result in results.items()
            if result.get("seconds", {}).get(batch)
        }
        best = min((taken for name, taken in medians.items() if name.startswith("predict")), default=None)
        rows: dict[str, Any] = {}
        for name, result in results.items():
            if name not in medians:
                rows[name] = {"not_measured": result.get("not_measured", "not yet")}
                continue
            taken = result["seconds"][batch]
            cosine = None
            if exact is not None:
                against = results[exact]["answers"][batch]
                cosine = float((result["answers"][batch] * against).sum(axis=-1).min())
            rows[name] = {
                "p50_ms": 1000 * medians[name],
                "p95_ms": 1000 * float(np.quantile(taken, 0.95)),
                "calls": len(taken),
                "times_our_predict": None if best is None else medians[name] / best,
                "least_cosine_to_float32": cosine,
                **result.get("memory", {}),
            }
            if (on_device := result.get("device", {}).get(batch)) is not None:
                rows[name]["device_ms"] = 1000 * on_device
        figures[str(batch)] = {"floor": floors[batch], "contenders": rows}
    return figures


def headline(batches: dict[str, Any]) -> dict[str, Any]:
    """The few figures that a summary of many benchmarks shows: medians in ms beside the bound."""
    shown: dict[str, Any] = {}
    for batch, figures in batches.items():
        bound = figures["floor"]["bfloat16"]
        line = {"weights read once": bound["read_ms"], "floor": bound["overlapped_ms"]}
        for name, row in figures["contenders"].items():
            if "p50_ms" in row:
                line[name] = row["p50_ms"]
            if "device_ms" in row:
                line[f"{name}, device"] = row["device_ms"]
        shown[f"batch {batch}, ms"] = {name: round(value, 3) for name, value in line.items()}
    return shown


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, nargs="+", choices=list(CALLS))
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--hidden-dim", type=int, default=2048, help="smaller, to try the script")
    parser.add_argument("--seconds", type=float, help="end after so long, with what is there by then")
    parser.add_argument(
        "--tiny", action="store_true", help="a small model, few contenders: to try the script"
    )
    given = parser.parse_args()
    began = time.monotonic()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the contenders share one device
    gpu = jax.default_backend() == "gpu"
    device = "gpu" if gpu else "cpu"
    batches: tuple[int, ...] = (1, 8, 32, 256) if gpu else (1, 8, 32)
    names: tuple[str, ...] = ON_GPU if gpu else ON_CPU
    rounds = given.rounds
    config = PredictorConfig(
        context_attention="causal", hidden_dim=given.hidden_dim, max_context_length=TURNS
    )
    if given.tiny:
        batches, names, rounds = (1, 8), TINY, 2
        config = PredictorConfig(
            input_dim=64, output_dim=64, hidden_dim=128, num_layers=2, context_attention="causal"
        )
    batches, names = tuple(given.batches or batches), tuple(given.contenders or names)
    if not set(EXACT) & set(names):
        names = ("predict float32", *names)  # all are compared with it
    machine = facts(*PACKAGES)
    measured = rates(256 if given.tiny else SIZE)
    floors = {batch: floor(config, batch, measured) for batch in batches}
    done = 0

    def write(study: Study) -> dict[str, Any]:
        by_batch = summarise(study.results, batches, floors)
        summary = {
            **machine,
            "measured_rates": measured,
            "model": {"hidden_dim": config.hidden_dim, "operations": operations(config)},
            "rounds": done,
            "batches": by_batch,
            "gpu": None if gpu else "not measured",
            "headline": headline(by_batch),
        }
        write_json(given.out / f"latency_{device}.json", summary)
        return summary

    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), config, onnx=any(name.startswith("ONNX") for name in names))
        spent = time.monotonic() - began
        ready_within = None if given.seconds is None else max(1.0, READY_BY * given.seconds - spent)
        study = Study(Path(folder), names, batches, ready_within)
        with progress("Timing", rounds, "rounds") as step:
            while done < rounds:
                study.time_round()
                done += 1
                if done == 1:
                    study.time_on_device()
                write(study)
                step(1)
                if given.seconds is not None and time.monotonic() - began > TIMED_BY * given.seconds:
                    break
        study.end()
    summary = write(study)
    for batch in batches:
        console.print(table(batch, summary["batches"][str(batch)]))
    try:
        plot(summary, given.out / f"latency_{device}.png")
    except ImportError as missing:
        console.print(f"no picture: {missing}")


def table(batch: int, figures: dict[str, Any]) -> Table:
    """The figures of one batch size, to print."""
    floors = figures["floor"]
    told = ", ".join(
        f"{dtype} {ends['overlapped_ms']:.2f} (in turn {ends['in_turn_ms']:.2f})"
        for dtype, ends in floors.items()
    )
    shown = Table(title=f"batch {batch}; floor in ms: {told}", title_justify="left")
    shown.add_column("", no_wrap=True)
    for column in ("p50 ms", "p95 ms", "device ms", "x our predict", "cosine", "peak MB"):
        shown.add_column(column, justify="right")
    for name, row in figures["contenders"].items():
        if "not_measured" in row:
            shown.add_row(name, "not measured", row["not_measured"][:40], "", "", "", "")
            continue
        shown.add_row(
            name,
            f"{row['p50_ms']:.2f}",
            f"{row['p95_ms']:.2f}",
            _number(row.get("device_ms"), ".2f"),
            _number(row["times_our_predict"], ".2f"),
            _number(row["least_cosine_to_float32"], ".5f"),
            _number(row.get("device_mb", row.get("host_mb")), ".0f"),
        )
    return shown


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def plot(summary: dict[str, Any], path: Path) -> None:
    """One panel for each batch size: medians as bars, the floors as lines."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    batches = summary["batches"]
    figure, panels = pyplot.subplots(1, len(batches), figsize=(4.6 * len(batches), 4.4), sharey=True)
    for axes, (batch, figures) in zip(np.atleast_1d(panels), batches.items(), strict=True):
        rows = {name: row for name, row in figures["contenders"].items() if "p50_ms" in row}
        colours = ["#2f7ed8" if name.startswith(("predict", "session")) else "#9aa0a6" for name in rows]
        bars = axes.barh(list(rows), [row["p50_ms"] for row in rows.values()], color=colours)
        axes.bar_label(bars, fmt="%.0f", padding=3)
        for dtype, style in (("float32", "-"), ("bfloat16", ":")):
            axes.axvline(
                figures["floor"][dtype]["overlapped_ms"], color="#d9822b", ls=style, label=f"floor {dtype}"
            )
        axes.set(title=f"batch {batch}", xlabel="median ms (less is better)")
        axes.margins(x=0.18)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    np.atleast_1d(panels)[-1].legend(loc="lower right", frameon=False)
    machine = summary["machine"]
    figure.suptitle(f"One prediction over ten turns: {machine['device']}, {machine['cores']} cores")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

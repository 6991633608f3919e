"""How long one prediction takes, beside peers on the same machine, weights and requests.

    python -m benchmarks.latency --out benchmarks/results

Times the default 206M model with ten turns: our `predict` and our causal session in each dtype, PyTorch eager
and compiled, ONNX Runtime on the exported file and its int8 version. Every contender has a process of its
own; they take turns, a few calls each, for many rounds, so that a slow minute of the machine hits all alike.
Beside them stands the floor: the time to read the weights once, and to do the products, at the rates measured
here. Writes latency_<device>.json and .png. On a machine with an NVIDIA GPU all but ONNX Runtime run there,
also at batch 256.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.table import Table

from benchmarks.common import facts
from benchmarks.contenders import CONTENDERS, ON_CPU, ON_GPU, TURNS, serve
from benchmarks.floor import floor, operations, rates
from prime_jax.export.optional import need
from prime_jax.export.to_onnx import to_onnx
from prime_jax.files import write_json
from prime_jax.models.prime import PredictorConfig
from prime_jax.models.state_dict import state_dict
from prime_jax.progress import console, progress

CALLS = {1: 5, 8: 3, 32: 2, 256: 2}  # in a row, each round
PACKAGES = ("jax", "jaxlib", "flax", "torch", "onnxruntime")


def write_model(folder: Path, config: PredictorConfig, *, onnx: bool) -> None:
    """The same random weights for everyone: config.json, model.safetensors and, on CPUs, two ONNX files."""
    from safetensors.numpy import save_file

    model = config.build(rngs=nnx.Rngs(0))
    save_file(state_dict(model), folder / "model.safetensors")
    write_json(folder / "config.json", {"model": config.model_dump()})
    if not onnx:
        return
    to_onnx(model, folder / "model.onnx")
    quantization = need("onnxruntime.quantization", "onnx")
    quantization.quantize_dynamic(folder / "model.onnx", folder / "model.int8.onnx", per_channel=True)


def measure(folder: Path, names: tuple[str, ...], batches: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Start every contender, check that they agree, time them in turns, and collect what they used."""
    spawn = multiprocessing.get_context("spawn")
    started: dict[str, Any] = {}
    results: dict[str, Any] = {}
    with progress("Starting", len(names), "contenders") as step:
        for name in names:
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=serve, args=(name, folder, batches, theirs), daemon=True)
            process.start()
            theirs.close()
            try:
                ready = ours.recv()
            except EOFError:
                ready = "the process died while starting"
            step(1, name)
            if isinstance(ready, str):
                results[name] = {"not_measured": ready}
                continue
            started[name] = ours
            results[name] = {"answers": ready, "seconds": {batch: [] for batch in batches}}
    with progress("Timing", rounds * len(batches), "turns") as step:
        for _ in range(rounds):
            for batch in batches:
                for name, pipe in started.items():
                    pipe.send((batch, CALLS[batch]))
                    results[name]["seconds"][batch] += pipe.recv()
                step(1, f"batch {batch}")
    for name, pipe in started.items():
        pipe.send(None)
        results[name]["memory"] = pipe.recv()
    return results


def summarise(results: dict[str, Any], batches: tuple[int, ...], floors: dict[int, Any]) -> dict[str, Any]:
    """p50, p95, ratio to our fastest predict and agreement with our float32, by batch size."""
    figures: dict[str, Any] = {}
    for batch in batches:
        medians = {
            name: statistics.median(result["seconds"][batch])
            for name, result in results.items()
            if "seconds" in result
        }
        best = min(taken for name, taken in medians.items() if name.startswith("predict"))
        exact = results["predict float32"]["answers"][batch]
        rows: dict[str, Any] = {}
        for name, result in results.items():
            if name not in medians:
                rows[name] = result
                continue
            taken = result["seconds"][batch]
            rows[name] = {
                "p50_ms": 1000 * medians[name],
                "p95_ms": 1000 * float(np.quantile(taken, 0.95)),
                "calls": len(taken),
                "times_our_predict": medians[name] / best,
                "least_cosine_to_float32": float((result["answers"][batch] * exact).sum(axis=-1).min()),
                **result["memory"],
            }
        figures[str(batch)] = {"floor": floors[batch], "contenders": rows}
    return figures


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
    given = parser.parse_args()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the contenders share one device
    gpu = jax.default_backend() == "gpu"
    device = "gpu" if gpu else "cpu"
    batches = tuple(given.batches or ((1, 8, 32, 256) if gpu else (1, 8, 32)))
    names = tuple(given.contenders or (ON_GPU if gpu else ON_CPU))
    if "predict float32" not in names:
        names = ("predict float32", *names)  # all are compared with it
    config = PredictorConfig(
        context_attention="causal", hidden_dim=given.hidden_dim, max_context_length=TURNS
    )
    measured = rates()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), config, onnx=any(name.startswith("ONNX") for name in names))
        results = measure(Path(folder), names, batches, given.rounds)
    summary = {
        **facts(*PACKAGES),
        "measured_rates": measured,
        "model": {"hidden_dim": given.hidden_dim, "operations": operations(config)},
        "rounds": given.rounds,
        "batches": summarise(results, batches, {batch: floor(config, batch, measured) for batch in batches}),
        "gpu": None if gpu else "not measured",
    }
    write_json(given.out / f"latency_{device}.json", summary)
    for batch in batches:
        console.print(table(batch, summary["batches"][str(batch)]))
    plot(summary, given.out / f"latency_{device}.png")


def table(batch: int, figures: dict[str, Any]) -> Table:
    """The figures of one batch size, to print."""
    floors = figures["floor"]
    told = ", ".join(
        f"{dtype} {ends['overlapped_ms']:.1f} (in turn {ends['in_turn_ms']:.1f})"
        for dtype, ends in floors.items()
    )
    shown = Table(title=f"batch {batch}; floor in ms: {told}", title_justify="left")
    shown.add_column("", no_wrap=True)
    for column in ("p50 ms", "p95 ms", "x our predict", "cosine", "peak MB"):
        shown.add_column(column, justify="right")
    for name, row in figures["contenders"].items():
        if "not_measured" in row:
            shown.add_row(name, "not measured", row["not_measured"][:40], "", "", "")
            continue
        shown.add_row(
            name,
            f"{row['p50_ms']:.1f}",
            f"{row['p95_ms']:.1f}",
            f"{row['times_our_predict']:.2f}",
            f"{row['least_cosine_to_float32']:.5f}",
            f"{row.get('device_mb', row['host_mb']):.0f}",
        )
    return shown


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

"""How fast training is and what memory it takes, beside PyTorch, and how both grow.

    python -m benchmarks.training --out benchmarks/results

1. Samples per second and peak memory of one step (forward, InfoNCE, backward, clipping, AdamW) at two sizes,
of
   our step and of the same model in PyTorch. Every contender has a process of its own; they take turns, a
   step each, for many rounds, so that a slow minute of the machine hits all alike.
2. Growth with the batch, from 256 to 65,536 rows, by gradient caching with a micro-batch of 256.
3. Growth with the corpus, from 10,000 to 1,000,000 passages, with all of them as negatives.

Writes training_<device>.json and .png. On a machine with a GPU also the default 206M model with and without
remat.
"""

import argparse
import multiprocessing
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from benchmarks.common import facts
from benchmarks.training_contenders import CONTENDERS, Made, ours, serve
from prime_jax.files import write_json
from prime_jax.models.prime import PredictorConfig
from prime_jax.progress import console, progress
from prime_jax.train.flops import flops_per_example, mfu

SMALL = PredictorConfig(input_dim=384, output_dim=384, hidden_dim=384, num_layers=2, num_heads=6)
MIDDLE = PredictorConfig(input_dim=768, output_dim=768, hidden_dim=1024, num_layers=4, num_heads=8)
SIZES = {"4M, batch 128": (SMALL, 128), "53M, batch 64": (MIDDLE, 64)}
BATCHES = (256, 1024, 4096, 16384, 65536)
PASSAGES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
MICRO_BATCH, ROWS = 256, 128
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch")


def measure(
    makers: dict[str, Callable[..., Made]], config: PredictorConfig, rows: int, rounds: int, warm: int = 2
) -> dict[str, Any]:
    """Start every contender, time them in turns, and collect what they used."""
    spawn = multiprocessing.get_context("spawn")
    started: dict[str, Any] = {}
    results: dict[str, Any] = {}
    for name, make in makers.items():
        here, there = spawn.Pipe()
        process = spawn.Process(target=serve, args=(make, config, rows, warm, there), daemon=True)
        process.start()
        there.close()
        try:
            told = here.recv()
        except EOFError:
            told = "the process ended while it was being prepared; most likely there was too little memory"
        if isinstance(told, str):
            results[name] = {"unavailable": told}
            process.join()
        else:
            results[name] = {"seconds": [], **told}
            started[name] = (here, process)
    with progress("Timing", rounds * len(started), "steps") as advance:
        for _ in range(rounds):
            for name, (pipe, _process) in started.items():
                pipe.send(1)
                results[name]["seconds"] += pipe.recv()
                advance(1, name)
    for name, (pipe, process) in started.items():
        pipe.send(None)
        seconds = results[name]["seconds"]
        results[name] |= {
            **pipe.recv(),
            "median_s": statistics.median(seconds),
            "samples_per_second": rows / statistics.median(seconds),
        }
        process.join()
    return results


def beside_peers(rounds: int) -> dict[str, Any]:
    """Ours and PyTorch, at both sizes; ratios are medians of the rounds' own ratios."""
    answer = {}
    for size, (config, rows) in SIZES.items():
        results = measure(CONTENDERS, config, rows, rounds)
        mine = results["prime-jax float32"]["seconds"]
        for result in results.values():
            if "seconds" in result:
                pairs = zip(result["seconds"], mine, strict=True)
                result["time_relative_to_ours"] = statistics.median(peer / own for peer, own in pairs)
        answer[size] = results
        _show(size, results)
    return answer


def growth(rounds: int) -> dict[str, Any]:
    """Time and memory by batch and by corpus, each size in a fresh process."""
    cached = partial(ours, micro_batch=MICRO_BATCH)
    by_batch, by_corpus = {}, {}
    for rows in BATCHES:
        times = max(1, min(rounds, 8192 // rows))
        warm = 2 if rows < 8192 else 0  # a step of minutes needs none: the program is compiled beforehand
        by_batch[str(rows)] = measure({"ours": cached}, SMALL, rows, times, warm)["ours"]
        console.print(f"batch {rows}: {_line(by_batch[str(rows)])}")
    for passages in PASSAGES:
        make = partial(ours, passages=passages)
        by_corpus[str(passages)] = measure({"ours": make}, SMALL, ROWS, min(rounds, 5))["ours"]
        console.print(f"{passages} passages: {_line(by_corpus[str(passages)])}")
    return {"batch": by_batch, "corpus": by_corpus, "micro_batch": MICRO_BATCH, "corpus_batch": ROWS}


def on_gpu(rounds: int) -> dict[str, Any]:
    """The default model as a GPU trains it, with and without remat (aim: 15,000 samples/s, 45% MFU)."""
    config, rows = PredictorConfig(), 2048
    makers = {
        f"bfloat16, remat {remat}": partial(ours, dtype=jnp.bfloat16, remat=remat)
        for remat in ("none", "dots", "blocks")
    }
    results: dict[str, Any] = {}
    for name, make in makers.items():  # one at a time: each wants the whole device
        results |= measure({name: make}, config, rows, rounds)
    results |= measure({"PyTorch eager bfloat16": CONTENDERS["PyTorch eager bfloat16"]}, config, rows, rounds)
    for result in results.values():
        if "seconds" in result:
            per_example = flops_per_example(config, recomputed=False)
            result["mfu"] = mfu(
                result["samples_per_second"], per_example, 1, jax.devices()[0].device_kind, "bfloat16"
            )
    _show(f"206M, batch {rows}", results)
    return results


def plot(grown: dict[str, Any], file: Path) -> None:
    """Time and memory against batch and corpus, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col")
    for column, (kind, label) in enumerate(
        (("batch", f"examples in a batch, {grown['micro_batch']} at a time"), ("corpus", "passages"))
    ):
        sizes = [int(size) for size in grown[kind]]
        results = list(grown[kind].values())
        seconds = [result["median_s"] for result in results]
        above, below = panels[0, column], panels[1, column]
        above.loglog(sizes, seconds, "o-", label="measured")
        above.loglog(
            sizes, [seconds[0] * size / sizes[0] for size in sizes], ":", color="grey", label="proportional"
        )
        above.set(ylabel="seconds per step", title=f"Growth with the {kind}")
        above.legend(frameon=False)
        below.loglog(sizes, [result["temporaries_mb"] for result in results], "o-", label="working memory")
        below.loglog(
            sizes,
            [result["arguments_mb"] for result in results],
            "s--",
            color="grey",
            label="weights and data",
        )
        below.set(xlabel=label, ylabel="MB", ylim=(10, None))
        below.legend(frameon=False)
    figure.savefig(file, dpi=120)


def _line(result: dict[str, Any]) -> str:
    if "unavailable" in result:
        return str(result["unavailable"])
    return (
        f"{result['median_s']:.2f} s, {result['samples_per_second']:,.0f} samples/s, working memory "
        f"{result['temporaries_mb']:,.0f} MB, weights and data {result['arguments_mb']:,.0f} MB"
    )


def _show(title: str, results: dict[str, Any]) -> None:
    table = Table("", "samples/s", "ms", "time / ours", "peak MB", title=title)
    for name, result in results.items():
        if "unavailable" in result:
            table.add_row(name, result["unavailable"])
            continue
        relative = result.get("time_relative_to_ours")
        table.add_row(
            name,
            f"{result['samples_per_second']:,.0f}",
            f"{1e3 * result['median_s']:,.0f}",
            "" if relative is None else f"{relative:.2f}",
            f"{result.get('device_mb', result['host_mb']):,.0f}",
        )
    console.print(table)


def main() -> None:
    """Measure everything this machine can, write the figures and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each contender")
    given = parser.parse_args()
    backend = jax.default_backend()
    results: dict[str, Any] = {**facts(*PACKAGES), "rounds": given.rounds}
    if backend == "gpu":
        results["default_model"] = on_gpu(given.rounds)
    results["peers"] = beside_peers(given.rounds)
    results["growth"] = growth(given.rounds)
    write_json(given.out / f"training_{backend}.json", results)
    plot(results["growth"], given.out / f"training_{backend}.png")


if __name__ == "__main__":
    main()

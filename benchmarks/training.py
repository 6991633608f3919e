"""How fast training is and what memory it takes, beside PyTorch, and how both grow.

    python -m benchmarks.training --out benchmarks/results

1. On a machine with a GPU: the default 206M model in bfloat16 at batch 2048, with and without remat and with
   gradient caching, beside PyTorch eager and compiled. Each wants most of the device's memory, so all are
   prepared side by side and then timed one after the other, several steps in a row.
2. Samples per second and peak memory of one step (forward, InfoNCE, backward, clipping, AdamW) at two sizes,
   of our step and of the same model in PyTorch. Every contender has a process of its own; all start side by
   side and take turns, a step each, for many rounds, so that a slow minute of the machine hits all alike.
3. Growth with the batch, from 256 to 65,536 rows, by gradient caching with a micro-batch of 256.
4. Growth with the corpus, from 10,000 to 1,000,000 passages, with all of them as negatives.

Writes training_<device>.json, anew as figures come, and .png. `--only` picks among default_model (1), peers
(2) and growth (3 and 4); `--seconds` bounds the first: contenders that are not ready in time are left out.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from benchmarks.common import facts
from benchmarks.side_by_side import Contender, ContenderError, Entry, start
from benchmarks.training_contenders import (
    CONTENDERS,
    DEFAULT_MODEL,
    TINY,
    TINY_MODEL,
    TINY_ROWS,
    Maker,
    is_ours,
    ours,
    serve,
)
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
WARM, IN_A_ROW, TINY_IN_A_ROW = 2, 5, 1
READY_BY = 0.65  # share of --seconds
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch")
Write = Callable[[dict[str, Any]], None]


def measure(
    makers: Mapping[str, Maker], config: Any, rows: int, rounds: int, warm: int = WARM
) -> dict[str, Any]:
    """Start every contender, time them in turns, and collect what they used."""
    ready, failed = _prepare(makers, config, rows, None)
    results: dict[str, Any] = {
        name: {"unavailable": failed[name]} if name in failed else {"seconds": [], **ready[name].told}
        for name in makers
    }
    for name, contender in ready.items():
        answer = _ask(contender, (warm, 1))
        results[name] = (
            answer if "unavailable" in answer else results[name] | {"first_losses": answer["losses"]}
        )
    with progress("Timing", rounds * len(ready), "steps") as advance:
        for _ in range(rounds):
            for name, contender in ready.items():
                if "unavailable" not in results[name]:
                    answer = _ask(contender, (1, 1))
                    if "unavailable" in answer:
                        results[name] = answer
                    else:
                        results[name]["seconds"] += answer["seconds"]
                advance(1, name)
    for name, contender in ready.items():
        if "unavailable" not in results[name]:
            results[name] |= _used(contender) | _rates(results[name]["seconds"], rows)
        contender.end()
    return results


def one_by_one(
    makers: Mapping[str, Maker],
    config: PredictorConfig,
    rows: int,
    rounds: int,
    in_a_row: int,
    seconds: float | None,
    write: Write,
) -> dict[str, Any]:
    """Prepare all contenders side by side, then time each alone on the device and end it."""
    began = time.monotonic()
    ready, failed = _prepare(makers, config, rows, None if seconds is None else READY_BY * seconds)
    results: dict[str, Any] = {name: {"unavailable": why} for name, why in failed.items()}
    write(results)
    for name, contender in ready.items():

        def left() -> float | None:
            return None if seconds is None else max(1.0, seconds - (time.monotonic() - began))

        first = _ask(contender, (WARM, 1), left())
        answer = first if "unavailable" in first else _ask(contender, (rounds, in_a_row), left())
        if "unavailable" in answer:
            results[name] = answer
        else:
            results[name] = {
                "first_losses": first["losses"],
                **contender.told,
                "seconds": answer["seconds"],
                **_used(contender),
                **_rates(answer["seconds"], rows),
            }
        contender.end()
        write(results)
    return results


def _prepare(
    makers: Mapping[str, Maker], config: PredictorConfig, rows: int, seconds: float | None
) -> tuple[dict[str, Contender], dict[str, str]]:
    gpu = jax.default_backend() == "gpu"
    entries = {
        name: Entry(serve, (make, config, rows), alone=gpu and is_ours(make)) for name, make in makers.items()
    }
    return start(entries, seconds)


def _ask(contender: Contender, order: Any, seconds: float | None = None) -> dict[str, Any]:
    try:
        answer = contender.ask(order, seconds)
    except ContenderError as gone:
        return {"unavailable": str(gone)}
    if isinstance(answer, str):
        return {"unavailable": answer}
    return {"losses": answer[0], "seconds": answer[1]}


def _used(contender: Contender) -> dict[str, float]:
    try:
        memory: dict[str, float] = contender.ask(None)
    except ContenderError:
        return {}
    return memory


def _rates(seconds: list[float], rows: int) -> dict[str, float]:
    median = statistics.median(seconds)
    return {"median_s": median, "samples_per_second": rows / median}


def beside_peers(rounds: int, write: Write) -> dict[str, Any]:
    """Ours and PyTorch, at both sizes; ratios are medians of the rounds' own ratios."""
    answer: dict[str, Any] = {}
    for size, (config, rows) in SIZES.items():
        results = measure(CONTENDERS, config, rows, rounds)
        answer[size] = relative_to(results, "prime-jax float32")
        write(answer)
        show(size, results)
    return answer


def relative_to(results: dict[str, Any], ours: str) -> dict[str, Any]:
    """Add the median of the rounds' own ratios to each contender's results."""
    mine = results.get(ours, {}).get("seconds")
    for result in results.values():
        if mine and "seconds" in result:
            pairs = zip(result["seconds"], mine, strict=True)
            result["time_relative_to_ours"] = statistics.median(peer / own for peer, own in pairs)
    return results


def growth(rounds: int, write: Write) -> dict[str, Any]:
    """Time and memory by batch and by corpus, each size in a fresh process."""
    cached = partial(ours, micro_batch=MICRO_BATCH)
    by_batch: dict[str, Any] = {}
    by_corpus: dict[str, Any] = {}
    grown = {"batch": by_batch, "corpus": by_corpus, "micro_batch": MICRO_BATCH, "corpus_batch": ROWS}
    for rows in BATCHES:
        times = max(1, min(rounds, 8192 // rows))
        warm = 2 if rows < 8192 else 0  # a step of minutes needs none: the program is compiled beforehand
        by_batch[str(rows)] = measure({"ours": cached}, SMALL, rows, times, warm)["ours"]
        write(grown)
        console.print(f"batch {rows}: {_line(by_batch[str(rows)])}")
    for passages in PASSAGES:
        make = partial(ours, passages=passages)
        by_corpus[str(passages)] = measure({"ours": make}, SMALL, ROWS, min(rounds, 5))["ours"]
        write(grown)
        console.print(f"{passages} passages: {_line(by_corpus[str(passages)])}")
    return grown


def default_model(rounds: int, seconds: float | None, tiny: bool, write: Write) -> dict[str, Any]:
    """The default model as a GPU trains it, beside its peers; the share of the device's peak where known."""
    config, rows = (TINY, TINY_ROWS) if tiny else (PredictorConfig(), 2048)
    per_example = flops_per_example(config, recomputed=False)

    def with_mfu(results: dict[str, Any]) -> dict[str, Any]:
        kind = jax.devices()[0].device_kind
        for result in results.values():
            if "seconds" in result:
                result["mfu"] = mfu(result["samples_per_second"], per_example, 1, kind, "bfloat16")
        return results

    makers = TINY_MODEL if tiny else DEFAULT_MODEL
    in_a_row = TINY_IN_A_ROW if tiny else IN_A_ROW
    results = one_by_one(
        makers, config, rows, rounds, in_a_row, seconds, lambda results: write(with_mfu(results))
    )
    show(f"{'tiny' if tiny else '206M'}, batch {rows}", results)
    return results


def headline(results: Mapping[str, Any]) -> dict[str, Any]:
    """The few figures that a summary of many benchmarks shows."""
    shown: dict[str, Any] = {}
    for name, result in results.get("default_model", {}).items():
        if "seconds" in result:
            line = {
                "samples/s": round(result["samples_per_second"]),
                "ms": round(1e3 * result["median_s"], 2),
            }
            if result.get("mfu") is not None:
                line["MFU %"] = round(100 * result["mfu"], 1)
            line["peak MB"] = round(result.get("device_mb", result.get("host_mb", 0)))
            shown[name] = line
    return shown


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


def show(title: str, results: dict[str, Any]) -> None:
    """Print what contenders did as a table."""
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
    parser.add_argument(
        "--only", nargs="+", choices=("default_model", "peers", "growth"), help="parts to run"
    )
    parser.add_argument("--seconds", type=float, help="the default model's contenders are done by then")
    parser.add_argument("--tiny", action="store_true", help="a small model on any device: to try the script")
    given = parser.parse_args()
    began = time.monotonic()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the contenders share one device
    backend = jax.default_backend()
    parts = given.only or (
        ("default_model",)
        if given.tiny
        else ("default_model", "peers", "growth")
        if backend == "gpu"
        else ("peers", "growth")
    )
    rounds = min(given.rounds, 3) if given.tiny else given.rounds
    results: dict[str, Any] = {**facts(*PACKAGES), "rounds": rounds}

    def write(part: str, found: dict[str, Any]) -> None:
        results[part] = found
        results["headline"] = headline(results)
        write_json(given.out / f"training_{backend}.json", results)

    if "default_model" in parts:
        left = None if given.seconds is None else given.seconds - (time.monotonic() - began)
        default_model(rounds, left, given.tiny, partial(write, "default_model"))
    if "peers" in parts:
        beside_peers(rounds, partial(write, "peers"))
    if "growth" in parts:
        plot(growth(rounds, partial(write, "growth")), given.out / f"training_{backend}.png")


if __name__ == "__main__":
    main()

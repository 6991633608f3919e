"""What a call costs on the host: the time of `predict` above that of its bare compiled program.

    python -m benchmarks.overhead --out benchmarks/results/overhead_cpu.json [--tiny]

A model of one layer, 128 wide, float32, batch 1, so that the device has next to nothing to do. Timed in turns
with the bare program (the one that `predict` runs, its packed input on the device already):
`predict`, a session's `predict`, and the round trip through a batcher that waits for nobody. The time on the
wall is a median over all calls. The time of the processors, all threads of the process, is a mean, and says
the same on a machine that does other things meanwhile. The file is written after each round.

`--label` says which version of the library is timed, and `--out` may name a file that holds other labels
already.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from rich.table import Table

from benchmarks.common import facts
from benchmarks.contenders import bare_call
from prime_jax.files import read_json, write_json
from prime_jax.models.prime import EmbeddingPredictor, PredictorConfig
from prime_jax.predict.predictor import Predictor
from prime_jax.progress import console, progress

CONFIG = PredictorConfig(
    input_dim=128,
    output_dim=128,
    hidden_dim=128,
    num_layers=1,
    num_heads=2,
    max_context_length=10,
    context_attention="causal",
)
BLOCK = 100  # calls in a row
BARE = "bare program"
Call = Callable[[], Any]


def calls(predictor: Predictor, close: list[Callable[[], None]]) -> dict[str, Call]:
    """What is timed, by name; `close` gets what has to be closed afterwards."""
    random = np.random.default_rng(0)
    context = random.normal(size=(CONFIG.max_context_length, CONFIG.input_dim)).astype(np.float32)
    query = random.normal(size=CONFIG.input_dim).astype(np.float32)
    mask = np.ones(len(context), bool)
    bare = bare_call(predictor, (context[None], query[None]))
    session = predictor.session()
    for turn in context:
        session.append(turn)
    session.prepare()
    batcher = predictor.batcher(max_delay_ms=0.0, max_batch=1)
    close.append(batcher.close)
    return {
        BARE: lambda: bare().block_until_ready(),
        "predict": lambda: predictor.predict(context, query, mask),
        "session predict": lambda: session.predict(query),
        "batcher round trip": lambda: batcher.predict(context, query, mask),
    }


def summarise(wall: dict[str, list[float]], processor: dict[str, list[float]]) -> dict[str, Any]:
    """Microseconds of a call, and of what it takes above the bare program."""
    rows: dict[str, Any] = {}
    for name, taken in wall.items():
        rows[name] = {
            "calls": len(taken),
            "p10_us": 1e6 * float(np.quantile(taken, 0.1)),
            "p50_us": 1e6 * statistics.median(taken),
            "processor_us": 1e6 * statistics.mean(processor[name]),
        }
    for row in rows.values():
        for figure in ("p10_us", "p50_us", "processor_us"):
            row[f"above_bare_{figure}"] = row[figure] - rows[BARE][figure]
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="file of results, JSON")
    parser.add_argument("--label", default="this version", help="what the figures stand under")
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--tiny", action="store_true", help="a hundred calls, to try the script")
    given = parser.parse_args()
    total = BLOCK if given.tiny else given.calls
    predictor = Predictor.from_model(
        EmbeddingPredictor(CONFIG, rngs=nnx.Rngs(0)), precision="float32", batch_sizes=(1,)
    )
    close: list[Callable[[], None]] = []
    timed = calls(predictor, close)
    wall: dict[str, list[float]] = {name: [] for name in timed}
    processor: dict[str, list[float]] = {name: [] for name in timed}
    results = read_json(given.out) if given.out.is_file() else {}
    for call in timed.values():
        for _ in range(BLOCK):
            call()
    rounds = max(total // BLOCK, 1)
    with progress("Timing", rounds, "rounds") as step:
        for number in range(rounds):
            for name, call in timed.items():
                before = time.process_time()
                for _ in range(BLOCK):
                    started = time.perf_counter()
                    call()
                    wall[name].append(time.perf_counter() - started)
                processor[name].append((time.process_time() - before) / BLOCK)
            step(1)
            if number % 10 == 0 or number == rounds - 1:
                results[given.label] = {**facts("jax", "jaxlib"), "figures": summarise(wall, processor)}
                write_json(given.out, results)
    for shut in close:
        shut()
    console.print(table(results[given.label]["figures"]))


def table(rows: dict[str, Any]) -> Table:
    """The figures, to print."""
    shown = Table(title="microseconds of a call", title_justify="left")
    shown.add_column("", no_wrap=True)
    for column in ("p50", "p50 above bare", "processor", "processor above bare"):
        shown.add_column(column, justify="right")
    for name, row in rows.items():
        figures = ("p50_us", "above_bare_p50_us", "processor_us", "above_bare_processor_us")
        shown.add_row(name, *(f"{row[figure]:.0f}" for figure in figures))
    return shown


if __name__ == "__main__":
    main()

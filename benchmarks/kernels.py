"""Where a training step and a prediction spend their time on the device.

    python -m benchmarks.kernels --out FILE.json [--tiny]

For the default 206M model in bfloat16: a step of training at batch 2048 (also with remat), and `predict` at
batch 1 and 256. Of each: the time of a call seen from the host, how long the device is busy in it, the
kernels that take most of it by name (from JAX's profiler), and in which dtypes its matrix products are
written. The next one who makes it faster begins here.
"""

import argparse
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.common import facts
from benchmarks.contenders import requests
from benchmarks.training_contenders import TINY, TINY_ROWS, our_step
from prime_jax.files import write_json
from prime_jax.models.prime import PredictorConfig
from prime_jax.nn.remat import Remat
from prime_jax.predict.predictor import Predictor

MOST = 25  # kernels of a case that are listed
PACKAGES = ("jax", "jaxlib", "flax", "numpy")
_PRODUCT = re.compile(r"stablehlo\.dot_general.*: \(tensor<([^>]*)>, tensor<([^>]*)>\) -> tensor<([^>]*)>")


class Event(NamedTuple):
    """One kernel, copy, or on CPUs one operation: when it began and how long it took, in nanoseconds."""

    name: str
    start: float
    duration: float


def product_dtypes(text: str) -> dict[str, int]:
    """How many matrix products a lowered program (StableHLO) holds, by the dtypes of factors and result."""
    kinds = Counter(
        "{} x {} -> {}".format(*(kind.rpartition("x")[2] for kind in found))
        for found in _PRODUCT.findall(text)
    )
    return dict(kinds.most_common())


def device_events(folder: Path) -> list[Event]:
    """What ran on the device, from a trace that JAX's profiler wrote into a folder.

    On a GPU that is what stands in its streams. A CPU has none: there it is the operations of the programs.
    """
    traces = [jax.profiler.ProfileData.from_file(str(file)) for file in sorted(folder.rglob("*.xplane.pb"))]
    planes = [plane for trace in traces for plane in trace.planes]
    on_gpu = [
        Event(event.name, event.start_ns, event.duration_ns)
        for plane in planes
        if plane.name.startswith("/device:")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
    return on_gpu or list(_on_cpu(planes))


def _on_cpu(planes: Sequence[Any]) -> Iterator[Event]:
    for plane in planes:
        for line in plane.lines:
            for event in line.events:
                if not event.name.startswith("end: ") and any(name == "hlo_op" for name, _ in event.stats):
                    yield Event(event.name, event.start_ns, event.duration_ns)


def busy_ns(events: Sequence[Event]) -> float:
    """How long at least one event ran, nanoseconds."""
    busy, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.start):
        end = event.start + event.duration
        busy += max(0.0, end - max(event.start, until))
        until = max(until, end)
    return busy


def profile(run: Callable[[], Any], calls: int) -> dict[str, Any]:
    """Times of one call of `run`, which waits for the device: from outside, on the device, by kernel."""
    for _ in range(2):
        run()
    started = time.perf_counter()
    for _ in range(calls):
        run()
    wall = (time.perf_counter() - started) / calls
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(calls):
                run()
        events = device_events(Path(folder))
    by_name: dict[str, list[float]] = {}
    for event in events:
        by_name.setdefault(event.name, []).append(event.duration)
    total = sum(event.duration for event in events) or 1.0
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:MOST]
    return {
        "wall_ms": 1e3 * wall,
        "device_busy_ms": busy_ns(events) / calls / 1e6,
        "launches": len(events) / calls,
        "kernels": [
            {
                "name": name[:120],
                "ms": sum(taken) / calls / 1e6,
                "share": sum(taken) / total,
                "launches": len(taken) / calls,
            }
            for name, taken in longest
        ],
    }


def training(config: PredictorConfig, rows: int, remat: Remat) -> dict[str, Any]:
    """A step of training, its batch on the device."""
    made = our_step(config, rows, dtype=jnp.bfloat16, remat=remat)
    state, batch = made.state, made.place(made.host)
    products, compiled = product_dtypes(made.lowered.as_text()), made.compiled
    del made  # the state's memory belongs to the first step

    def run() -> None:
        nonlocal state
        state, metrics = compiled(state, batch, None)
        jax.block_until_ready(metrics["loss"])

    counted = compiled.memory_analysis()
    return {
        "temporaries_mb": counted.temp_size_in_bytes / 1e6,
        "products": products,
        **profile(run, 3),
    }


def predictions(config: PredictorConfig, batches: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """`predict`, from numpy to numpy, at each batch size, as `auto` computes it."""
    config = config.model_copy(update={"max_batch_size": batches[-1]})
    predictor = Predictor.from_model(config.build(rngs=nnx.Rngs(0)), batch_sizes=batches)
    for batch in batches:
        context, query = requests(batch, config.input_dim)
        found = profile(lambda context=context, query=query: predictor.predict(context, query), 20)  # type: ignore[misc]
        yield batch, {"precision": predictor.info()["precision"].get(batch), **found}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write the file anew after each case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--tiny", action="store_true", help="a small model: to try the script")
    given = parser.parse_args(argv)
    config, rows, batches = (TINY, TINY_ROWS, (1, 8)) if given.tiny else (PredictorConfig(), 2048, (1, 256))
    cases: dict[str, Any] = {}
    machine = facts(*PACKAGES)

    def write(name: str, found: dict[str, Any]) -> None:
        cases[name] = found
        headline = {}
        for case, figures in cases.items():
            longest = ", ".join(
                f"{kernel['name'][:40]} {100 * kernel['share']:.0f}%" for kernel in figures["kernels"][:3]
            )
            headline[case] = {
                "ms": round(figures["wall_ms"], 3),
                "device busy ms": round(figures["device_busy_ms"], 3),
                "launches": round(figures["launches"]),
                "most in": longest,
            }
        write_json(given.out, {**machine, "headline": headline, "cases": cases})

    size = "tiny" if given.tiny else "206M"
    write(f"training step, {size}, bfloat16, batch {rows}", training(config, rows, "none"))
    for batch, found in predictions(config, batches):
        write(f"predict, {size}, batch {batch}", found)
    if not given.tiny:
        write(
            f"training step, {size}, bfloat16, batch {rows}, remat blocks", training(config, rows, "blocks")
        )


if __name__ == "__main__":
    main()

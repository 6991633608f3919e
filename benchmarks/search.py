"""Exact search of a large corpus: ours beside PyTorch's and faiss', from numpy to numpy.

    python -m benchmarks.search --out FILE.json [--tiny] [--passages 1000000] [--seconds 120]

Random unit vectors, made on the device: 1,000,000 x 1,024 passages in float16, 1,000 float32 queries, the
best ten. Figures:

- `first call`: a new `ExactIndex` on a corpus in host memory, its first search; compiling counted apart.
- `index`: the same index searched again; on an accelerator the corpus is there by now (`resident`).
- `streamed`: `search`, which copies the corpus each time (on a CPU it is where it has to be).
- `torch float16`, `torch float32`: a matrix product and `topk` on the corpus on the device, in that dtype.
- `faiss flat`: `IndexFlatIP` of the float32 corpus, on the host.

Beside each time stands `agrees`, the share of its ids that `index` found too. `--before DIR` times `search`
of another checkout in turns with ours, in its own process. A figure is written as soon as it is there.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import facts
from prime_jax.files import write_json
from prime_jax.retrieval.topk import ExactIndex, search

Found = tuple[np.ndarray, np.ndarray]
K, ROUNDS = 10, 7
MADE_AT_ONCE = 65_536  # rows
SCORES_AT_ONCE = 2**29  # of PyTorch, 2 GB in float32

WORKER = """
import sys, time
import numpy as np
from prime_jax.retrieval.topk import search
corpus, queries = np.load(sys.argv[1], mmap_mode="r"), np.load(sys.argv[2])
search(queries, corpus, int(sys.argv[3]))
for _ in sys.stdin:
    started = time.perf_counter()
    search(queries, corpus, int(sys.argv[3]))
    print(time.perf_counter() - started, flush=True)
"""


class SkippedError(Exception):
    """A contender that makes no sense on this machine."""


def unit_vectors(rows: int, dim: int, seed: int, dtype: Any) -> np.ndarray:
    """Random directions `[rows, dim]`, made on the device some rows at a time."""

    @jax.jit
    def some(key: jax.Array) -> jax.Array:
        drawn = jax.random.normal(key, (min(rows, MADE_AT_ONCE), dim), jnp.float32)
        scaled: jax.Array = (drawn / jnp.linalg.norm(drawn, axis=1, keepdims=True)).astype(dtype)
        return scaled

    made = np.empty((rows, dim), dtype)
    for start in range(0, rows, MADE_AT_ONCE):
        stop = min(start + MADE_AT_ONCE, rows)
        made[start:stop] = np.asarray(some(jax.random.fold_in(jax.random.key(seed), start)))[: stop - start]
    return made


def timed(call: Callable[[], Found]) -> tuple[float, Found]:
    """Seconds, and the answer."""
    started = time.perf_counter()
    answer = call()
    return time.perf_counter() - started, answer


def torch_search(corpus: np.ndarray, queries: np.ndarray, dtype: str) -> Callable[[], Found]:
    """A matrix product and `topk`, the corpus on the device already, as many queries at a time as fit."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and dtype == "float16" and len(corpus) > MADE_AT_ONCE:
        raise SkippedError("CPUs have no fast float16 products")
    there = torch.from_numpy(corpus).to(device=device, dtype=getattr(torch, dtype))
    at_once = max(1, SCORES_AT_ONCE // len(corpus))

    def find() -> Found:
        parts = []
        with torch.inference_mode():
            for start in range(0, len(queries), at_once):
                asked = torch.from_numpy(queries[start : start + at_once]).to(there)
                parts.append(torch.topk(asked @ there.T, K, dim=1))
            scores = torch.cat([part.values for part in parts]).float().cpu().numpy()
            rows = torch.cat([part.indices for part in parts]).cpu().numpy()
        return scores, rows

    return find


def faiss_search(corpus: np.ndarray, queries: np.ndarray) -> Callable[[], Found]:
    """`IndexFlatIP`, filled already."""
    import faiss

    index = faiss.IndexFlatIP(corpus.shape[1])
    for start in range(0, len(corpus), MADE_AT_ONCE):
        index.add(np.ascontiguousarray(corpus[start : start + MADE_AT_ONCE], np.float32))
    return lambda: index.search(queries, K)


class Report:
    """Figures by name, each written as soon as it is there."""

    def __init__(self, path: Path, facts: dict[str, Any]):
        self._path, self.figures = path, dict[str, Any]()
        self._facts = facts
        self._write(complete=False)

    def add(self, name: str, figure: dict[str, Any]) -> None:
        """Write a figure, and show it."""
        self.figures[name] = figure
        self._write(complete=False)
        print(name, figure, flush=True)

    def done(self) -> None:
        """Say in the file that nothing is missing."""
        self._write(complete=True)

    def _write(self, *, complete: bool) -> None:
        write_json(self._path, {"complete": complete, "figures": self.figures, **self._facts})


def installed(*packages: str) -> list[str]:
    """Those of some packages that are there."""

    def there(name: str) -> bool:
        try:
            return bool(version(name))
        except PackageNotFoundError:
            return False

    return [name for name in packages if there(name)]


def compare_with_before(folder: Path, corpus: np.ndarray, queries: np.ndarray, place: Path) -> dict[str, Any]:
    """`search` of another checkout and ours, in turns."""
    files = place / "corpus.npy", place / "queries.npy"
    for file, values in zip(files, (corpus, queries), strict=True):
        np.save(file, values)
    seconds: dict[str, list[float]] = {"before": [], "after": []}
    folders = {"before": folder.resolve(), "after": Path(__file__).parents[1]}
    workers = {
        name: subprocess.Popen(
            [sys.executable, "-c", WORKER, *map(str, files), str(K)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder)},
        )
        for name, folder in folders.items()
    }
    try:
        for _ in range(ROUNDS):
            for name, worker in workers.items():
                assert worker.stdin is not None
                assert worker.stdout is not None
                print(file=worker.stdin, flush=True)
                seconds[name].append(float(worker.stdout.readline()))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return {
        name: {"median_s": statistics.median(found), "least_s": min(found)} for name, found in seconds.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Make the data, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--tiny", action="store_true", help="2,000 x 64 and 50 queries: does it run?")
    parser.add_argument("--passages", type=int, default=1_000_000, metavar="M")
    parser.add_argument("--dim", type=int, default=1024, metavar="E")
    parser.add_argument("--queries", type=int, default=1000, metavar="Q")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the corpus")
    parser.add_argument("--seconds", type=float, help="start no further figure after that many")
    parser.add_argument("--before", type=Path, metavar="DIR", help="another checkout, to be timed as well")
    given = parser.parse_args(argv)
    started = time.perf_counter()
    size = (2000, 64, 50) if given.tiny else (given.passages, given.dim, given.queries)
    passages, dim, count = size
    report = Report(
        given.out,
        {
            "passages": passages,
            "dim": dim,
            "queries": count,
            "k": K,
            "dtype": given.dtype,
            "tiny": given.tiny,
            **facts(*installed("jax", "numpy", "torch", "faiss-cpu", "faiss-gpu")),
        },
    )
    corpus = unit_vectors(passages, dim, 0, np.dtype(given.dtype))
    queries = unit_vectors(count, dim, 1, np.dtype(np.float32))
    index = ExactIndex(corpus)
    first, _ = timed(lambda: index.search(queries, K))
    fresh = ExactIndex(corpus)
    again, _ = timed(lambda: fresh.search(queries, K))
    report.add("first call", {"median_s": again, "with_compiling_s": first})
    del fresh
    _, best = timed(lambda: index.search(queries, K))

    def measure(name: str, make: Callable[[], Callable[[], Found]], **more: Any) -> None:
        if given.seconds is not None and time.perf_counter() - started > given.seconds:
            report.add(name, {"skipped": f"{given.seconds:g} s were over"})
            return
        try:
            call = make()
            call()
        except (ImportError, SkippedError) as missing:
            report.add(name, {"skipped": f"{missing}"})
            return
        except Exception as failed:  # one contender's failure must not cost the others their figures
            report.add(name, {"failed": f"{type(failed).__name__}: {failed}"[:400]})
            return
        seconds, answers = zip(*(timed(call) for _ in range(ROUNDS)), strict=True)
        alike = [np.isin(one, other).mean() for one, other in zip(answers[0][1], best[1], strict=True)]
        report.add(
            name,
            {
                "median_s": statistics.median(seconds),
                "least_s": min(seconds),
                "agrees": float(np.mean(alike)),
                **more,
            },
        )

    measure("index", lambda: lambda: index.search(queries, K), resident=index.resident)
    measure("torch float16", lambda: torch_search(corpus, queries, "float16"))
    measure("torch float32", lambda: torch_search(corpus, queries, "float32"))
    measure("streamed", lambda: lambda: search(queries, corpus, K))
    measure("faiss flat", lambda: faiss_search(corpus, queries))
    if given.before is not None:
        with tempfile.TemporaryDirectory() as place:
            report.add("search", compare_with_before(given.before, corpus, queries, Path(place)))
    report.done()


if __name__ == "__main__":
    main()

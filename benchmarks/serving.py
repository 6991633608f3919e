"""The real HTTP server under load, with bad requests in between.

    python -m benchmarks.serving --run runs/quickstart --out benchmarks/results

Starts `python -m prime_jax.serve` and sends valid requests from many clients at once, as numbers and as
base64; among them malformed, oversize, NaN and misshapen bodies, and clients that hang up. Every status and
every answer is checked, and in the end the server's health, its own count of failures, and that SIGTERM stops
it with exit code 0. Clients and server share this machine's cores. Without --run the quickstart's model
serves with random weights. Writes http.json; exit code 1 if anything was not as it should be.
"""

import argparse
import asyncio
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import prime_jax
from benchmarks.common import facts, random_model, sample
from benchmarks.http_client import Call, Client, chunked, post
from prime_jax.export.bundle import write_bundle
from prime_jax.files import write_json
from prime_jax.models import AnyConfig
from prime_jax.predict.schema import PredictorOutput, to_base64
from prime_jax.serve.settings import ServeSettings

DIFFERENT = 256  # valid requests that differ; they come again and again
TOLERANCE = 1e-5
START_SECONDS = 300


def valid_calls(config: AnyConfig) -> list[Call]:
    """Each request once as numbers and once as base64, asking for its answer in the same form."""
    calls = []
    for row, (context, query) in enumerate(sample(config, DIFFERENT)):
        as_list = {"context_embeddings": context.tolist(), "query_embedding": query.tolist()}
        as_text = {
            "context_embeddings": [to_base64(turn) for turn in context],
            "query_embedding": to_base64(query),
            "encoding": "base64",
        }
        calls.append(Call("list", post(json.dumps(as_list).encode()), 200, row))
        calls.append(Call("base64", post(json.dumps(as_text).encode()), 200, row))
    return calls


def bad_calls(config: AnyConfig) -> list[Call]:
    """One of each kind, with the status it must get; None where nobody is left to receive one."""
    limit = ServeSettings(run=Path()).body_limit(config)
    vector = [0.5] * config.input_dim

    def body(query: list[float]) -> bytes:
        return json.dumps({"context_embeddings": [vector], "query_embedding": query}).encode()

    whole = post(body(vector))
    return [
        Call("malformed", post(b'{"context_embeddings": [['), 400),
        Call("oversize, declared", post(b"", length=limit + 1), 413),
        Call("oversize, chunked", chunked(b" " * (limit + 1)), 413),
        Call("NaN", post(body([float("nan"), *vector[1:]])), 422),
        Call("wrong dimension", post(body(vector[1:])), 422),
        Call("hang-up after the request", whole, None),
        Call("hang-up within the body", whole[: len(whole) // 2], None),
    ]


def plan(config: AnyConfig, requests: int, bad_every: int) -> list[Call]:
    """The valid requests in a shuffled order, and after every few a bad one, all kinds in turn."""
    valid, bad = valid_calls(config), bad_calls(config)
    order = np.random.default_rng(0).permutation(requests) % len(valid)
    calls = []
    for count, row in enumerate(order, start=1):
        calls.append(valid[row])
        if count % bad_every == 0:
            calls.append(bad[count // bad_every % len(bad)])
    return calls


async def load(port: int, calls: list[Call], clients: int) -> tuple[float, list[Any]]:
    """Send all calls, each client its next one when it has the answer; seconds it took, and the answers."""
    waiting = iter(enumerate(calls))
    answers: list[Any] = [None] * len(calls)

    async def one() -> None:
        async with Client(port) as client:
            for place, call in waiting:
                answers[place] = await client.send(call)

    started = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    return time.perf_counter() - started, answers


def faults(calls: list[Call], answers: list[Any], expected: np.ndarray) -> tuple[list[str], float]:
    """What is not as it should be, in words, and the largest difference from a single prediction."""
    found, largest = [], 0.0
    for call, answer in zip(calls, answers, strict=True):
        if answer.status != call.expected:
            found.append(f"{call.kind}: {answer.status} instead of {call.expected}: {answer.body[:200]!r}")
        elif call.row is not None:
            vector = PredictorOutput.model_validate_json(answer.body).vector
            largest = max(largest, float(np.abs(vector - expected[call.row]).max()))
    if not largest <= TOLERANCE:
        found.append(f"an answer differs from the single one by {largest}")
    return found, largest


@contextmanager
def server(run: Path) -> Iterator[int]:
    """The command as an operator starts it, on a free port; stopped by SIGTERM, which must end it well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    words = ["--run", str(run), "--port", str(port), "--precision", "float32"]
    process = subprocess.Popen([sys.executable, "-m", "prime_jax.serve", *words])
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit("the server did not start")
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield port
        process.send_signal(signal.SIGTERM)
        if code := process.wait(60):
            sys.exit(f"the server ended with exit code {code}")
    finally:
        process.kill()


def main() -> int:
    """Run the benchmark; 1 if anything was not as it should be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="run or bundle (default: random weights)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--requests", type=int, default=10_000, help="valid ones")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--bad-every", type=int, default=10, help="a bad one after so many valid ones")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = given.run
        if run is None:
            run = Path(folder) / "bundle"
            write_bundle(random_model(), run, facts={})
        predictor = prime_jax.load(run, precision="float32")
        config = predictor.model.config
        expected = np.stack([predictor.predict(*asked) for asked in sample(config, DIFFERENT)])
        calls = plan(config, given.requests, given.bad_every)
        with server(run) as port:
            asyncio.run(load(port, valid_calls(config), given.clients))  # warm
            seconds, answers = asyncio.run(load(port, calls, given.clients))
            health, page = asyncio.run(after(port))
    wrong, largest = faults(calls, answers, expected)
    counted = server_counts(page)
    if health.status != 200 or json.loads(health.body)["status"] != "ok":
        wrong.append(f"/health answers {health.status} {health.body!r}")
    wrong += [
        f"the server counted {count} answers {status}" for status, count in counted.items() if status >= "500"
    ]
    result = {
        **facts("jax", "jaxlib", "fastapi", "uvicorn", "pydantic"),
        "model": {"weights": "random" if given.run is None else "trained", **config.model_dump()},
        "settings": {"clients": given.clients, "requests": given.requests, "bad_every": given.bad_every},
        "seconds": seconds,
        "valid_per_second": given.requests / seconds,
        "latency": latency(calls, answers),
        "sent": dict(Counter(f"{call.kind}: {call.expected or 'hung up'}" for call in calls)),
        "counted_by_the_server": counted,
        "largest_error": largest,
        "faults": len(wrong),
    }
    write_json(given.out / "http.json", result)
    print(json.dumps({name: result[name] for name in list(result)[5:]}, indent=2))
    for fault in wrong[:10]:
        print(fault, file=sys.stderr)
    return 1 if wrong else 0


async def after(port: int) -> tuple[Any, Any]:
    """What /health and /metrics say."""
    async with Client(port) as client:
        return await client.get("/health"), (await client.get("/metrics")).body.decode()


def server_counts(page: str) -> dict[str, int]:
    """Answers by status, from the metrics page."""
    counts: Counter[str] = Counter()
    for line in page.splitlines():
        if line.startswith("prime_jax_requests_total"):
            labels, count = line.rsplit(" ", 1)
            counts[labels.split('status="')[1][:3]] += int(float(count))
    return dict(sorted(counts.items()))


def latency(calls: list[Call], answers: list[Any]) -> dict[str, dict[str, float]]:
    """p50 and p95 of the valid requests, by form."""
    found = {}
    for kind in ("list", "base64"):
        taken = [answer.seconds for call, answer in zip(calls, answers, strict=True) if call.kind == kind]
        p50, p95 = 1000 * np.quantile(taken, (0.5, 0.95))
        found[kind] = {"p50_ms": float(p50), "p95_ms": float(p95), "requests": len(taken)}
    return found


if __name__ == "__main__":
    sys.exit(main())

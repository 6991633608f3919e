"""Running `python -m prime_jax.train` as users do: in processes of its own."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import fakes
import numpy as np

from prime_jax.errors import CheckpointError
from prime_jax.train import checkpoints

TESTS = Path(__file__).parents[1]

# A run of a few seconds.
SETTINGS = [
    *("--model.input-dim", f"{fakes.DIM}", "--model.output-dim", f"{fakes.DIM}", "--model.hidden-dim", "128"),
    *("--model.num-layers", "1", "--model.num-heads", "4", "--model.max-context-length", "4"),
    *("--train.batch-size", "8", "--train.num-epochs", "2", "--train.warmup-steps", "2"),
    *("--train.learning-rate", "0.003", "--train.gradient-checkpointing", "false"),
    *("--train.mixed-precision", "false", "--data.encoder", "fakes:encoder"),
    *("--mesh.data", "2"),
]


def environment(devices: int = 1) -> dict[str, str]:
    """That of a user, with the tests' own encoder within reach and this many CPU devices."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PRIME_", "COV_"))}
    return kept | {
        "XLA_FLAGS": re.sub(r"device_count=\d+", f"device_count={devices}", os.environ["XLA_FLAGS"]),
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "PRIME_JAX_CACHE": "",
        "JAX_PLATFORMS": "cpu",
    }


def start(
    options: list[str],
    out: Path,
    *more: str,
    devices: int = 1,
    log: Path | None = None,
    cache: Path | None = None,
) -> Any:
    """A training run on its way; its words go to `log`."""
    command = [sys.executable, "-m", "prime_jax.train", *options, "--out", str(out), *more]
    stream = (log or out.with_suffix(".log")).open("a")
    variables = environment(devices)
    if cache is not None:
        variables |= {"JAX_COMPILATION_CACHE_DIR": str(cache)}
        variables |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(command, env=variables, stdout=stream, stderr=subprocess.STDOUT)


def start_together(count: int, options: list[str], out: Path, *more: str, devices: int = 1) -> list[Any]:
    """One run in `count` processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(count)]
    return [
        start(
            options,
            out,
            *more,
            *flags,
            *("--process-id", str(index)),
            devices=devices,
            log=out.with_name(f"{out.name}-{index}.log"),
        )
        for index in range(count)
    ]


def exit_codes(processes: list[Any]) -> list[int]:
    """Wait for the end of all of them."""
    try:
        return [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()


def history(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def figures(run: Path, *names: str) -> dict[str, np.ndarray]:
    """Columns of the history, in order."""
    rows = history(run)
    return {name: np.array([row[name] for row in rows if name in row]) for name in names}


def newest_step(run: Path) -> int:
    """Step of the newest complete checkpoint of a run in progress, 0 when there is none."""
    try:
        newest = checkpoints.latest(run)
    except CheckpointError:  # it was being dropped while we looked
        return newest_step(run)
    return newest.step if newest else 0

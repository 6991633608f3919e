"""The parts of `benchmarks.gpu`: a command line, a limit and an output file each, and how one is run."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.side_by_side import descendants, kill_all, kill_tree

ROOT = Path(__file__).parents[1]
SPARE_S = 5  # what a part that watches its own time is told to leave
GRACE_S = 3  # between asking a part to end and killing it
NO_FIGURES = ("versions", "machine", "measured_rates")
SHOWN = 8  # figures of a part that does not say which ones matter


class Part(NamedTuple):
    """One thing to measure.

    Attributes:
        name: What it is called, and the stem of its file.
        module: What is run.
        options: Its options; {file}, {folder} and {seconds} stand for what they say.
        weight: Its share of the time, in no particular unit.
        at_most: Seconds that it must never need more of, or None.
        shares_programs: Whether it may find programs that other parts compiled.
    """

    name: str
    module: str
    options: str
    weight: float
    at_most: float | None = None
    shares_programs: bool = True


PARTS = (  # by worth
    Part("latency", "benchmarks.latency", "--out {folder} --rounds 6 --seconds {seconds}", 150),
    Part(
        "training",
        "benchmarks.training",
        "--out {folder} --only default_model --rounds 6 --seconds {seconds}",
        120,
    ),
    Part("search", "benchmarks.search", "--out {file} --seconds {seconds}", 45),
    Part("cold_start", "benchmarks.cold_start", "--out {file}", 55, shares_programs=False),
    Part("overhead", "benchmarks.overhead", "--out {file}", 25),
    Part("kernels", "benchmarks.kernels", "--out {file}", 45),
    Part("encoders", "benchmarks.encoders", "--out {file} --seconds {seconds}", 45),
    Part(
        "text",
        "benchmarks.text",
        "--out {file} --rows 256 --rounds 3 --only prime-jax pytorch-eager",
        40,
    ),
    Part("tests", "benchmarks.gpu_tests", "--out {file}", 60, at_most=60),
)


def run_part(
    part: Part, folder: Path, device: str, limit: float, env: dict[str, str], *, tiny: bool
) -> dict[str, Any]:
    """Run one part within its limit.

    Args:
        part: What to run.
        folder: Where its results and its log go.
        device: "gpu" or "cpu", for the name of its file.
        limit: Seconds after which it is killed, with all its processes.
        env: Environment of the process.
        tiny: Run it small.

    Returns:
        Its `status`: "done", "out of time", "failed", or "not there"; `why`, where it is not done; its
        `seconds`, `limit_s`, the number of `figures` in its `file`, and a `headline`, the few that matter.
    """
    if find_spec(part.module) is None:
        return {"status": "not there", "why": f"there is no module {part.module}"}
    file = folder.resolve() / f"{part.name}_{device}.json"
    log = folder / f"{part.name}.log"
    options = part.options.format(
        file=file, folder=folder.resolve(), seconds=f"{max(1.0, limit - SPARE_S):.0f}"
    )
    command = [sys.executable, "-m", part.module, *options.split(), *(["--tiny"] if tiny else [])]
    began, clock = time.time(), time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=_environment(part, env),
            start_new_session=True,
        )
        in_time = True
        try:
            process.wait(max(1.0, limit))
        except subprocess.TimeoutExpired:
            in_time = False
        finally:
            _stop(process)
    found: dict[str, Any] = {
        "seconds": round(time.monotonic() - clock, 1),
        "limit_s": round(limit, 1),
        "file": file.name,
    }
    results = _read(file, since=began)
    figures = numbers(results)
    found["figures"] = len(figures)
    if isinstance(results, dict) and isinstance(results.get("headline"), dict):
        found["headline"] = results["headline"]
    else:
        found["headline"] = dict(list(figures.items())[:SHOWN])
    if not in_time:
        return {"status": "out of time", "why": "killed at its limit", **found}
    if process.returncode:
        why = f"exit code {process.returncode}: {_last_line(log)}"
        return {"status": "failed", "why": why, **found}
    if not figures:
        return {"status": "failed", "why": f"ended well but wrote no figures to {file.name}", **found}
    return {"status": "done", **found}


def _environment(part: Part, env: dict[str, str]) -> dict[str, str]:
    if part.shares_programs:
        return env
    own = {name: value for name, value in env.items() if not name.startswith(("JAX_COMPIL", "JAX_PERSIST"))}
    return {**own, "XDG_CACHE_HOME": f"{env['TMPDIR']}/{part.name}"}


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a part and all that it started: an interrupt first, so that it can put its temporary files away."""
    started = []
    if process.poll() is None:
        started = descendants(process.pid)  # once it has ended, nobody knows whose they were
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT)
            process.wait(GRACE_S)
    if process.poll() is None:
        kill_tree(process.pid)
    kill_all(started)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # children that outlived it
    process.wait()


def _read(file: Path, since: float) -> Any:
    """What a part wrote in this run, None where it wrote nothing."""
    try:
        if file.stat().st_mtime < since - 1:  # of an earlier run
            return None
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"


def numbers(value: Any, at: str = "") -> dict[str, float]:
    """Every number in nested results by its path, versions and the machine's own facts left out."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return {}
    if isinstance(value, int | float):
        return {at: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found: dict[str, float] = {}
    for name, inner in items:
        if name not in NO_FIGURES:
            found |= numbers(inner, f"{at}/{name}" if at else str(name))
    return found

"""All GPU figures in one command, for a machine that one has for a few minutes.

    python -m benchmarks.gpu --minutes 8 --out DIR
    python -m benchmarks.gpu --tiny --out DIR        # everything small, on a CPU, to see that it runs

Needs no network and no data: weights, vectors and token ids are random, of the shapes that matter. The parts
run one after the other, most valuable first, each as a command of its own with a time limit: its share of
what is left, so that time which one part does not need goes to those after it. A part that runs over is
killed with all its processes; what it had written stays, and counts.

    latency     prediction from numpy to numpy beside PyTorch eager, compiled and as a CUDA graph
    training    the 206M model in bfloat16: samples per second, MFU, peak memory, beside PyTorch
    search      exact search
    cold_start  first and second load of a predictor
    overhead    what a call of `predict` costs on the host
    kernels     where a training step and a prediction spend their time on the device
    encoders    text encoders beside sentence-transformers
    text        training a text predictor beside PyTorch
    tests       the tests marked gpu

Writes DIR/<part>_gpu.json as each goes on, DIR/<part>.log, and after each part DIR/summary.json and a table.
Called again with the same DIR it goes on with the parts that are not done; `--again` repeats them, `--only`
picks some. Compiled programs are shared by all parts but cold_start, in a folder that goes at the end unless
`--programs` names one. Exit code: 1 if a part failed, 2 for a wrong call.

A machine made for PyTorch and JAX usually has jax with its CUDA plugin, jaxlib, flax, optax,
orbax-checkpoint, torch, transformers, sentence-transformers, safetensors, numpy, scipy, rich and pytest. What
it usually lacks, to be carried there as wheels and put on PYTHONPATH: pydantic, pydantic-core,
pydantic-settings, annotated-types, typing-inspection and python-dotenv, jaxtyping, grain with array-record,
and for the tests alone beartype and ir-measures. Neither onnx, onnxruntime nor jax2onnx is needed. What is
missing is named at the start.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.parts import PARTS, Part, run_part
from prime_jax.errors import CheckpointError
from prime_jax.files import read_json, write_json

ROOT = Path(__file__).parents[1]
NEEDED = {
    "jax": "all",
    "jaxtyping": "all",
    "rich": "all",
    "flax": "all",
    "optax": "all",
    "orbax": "all",
    "pydantic": "all",
    "pydantic_settings": "all",
    "grain": "all",
    "safetensors": "all",
    "scipy": "all",
    "yaml": "all",
    "torch": "peers",
    "transformers": "encoders and text",
    "sentence_transformers": "encoders",
    "pytest": "tests",
    "beartype": "tests",
    "ir_measures": "tests",
    "matplotlib": "pictures",
}
SMALL_ON_CPU = {  # programs that are fast to compile, on no more threads than there are cores
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
}
PROBE = """
import json, sys
import jax
from benchmarks.common import facts
packages = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "optax", "numpy", "torch",
            "triton", "transformers", "sentence-transformers")
print(json.dumps({**facts(*packages), "backend": jax.default_backend()}))
"""


class UsageError(Exception):
    """A wrong call; the message says what to do."""


def environment(programs: Path, scratch: Path, tiny: bool) -> dict[str, str]:
    """What all parts inherit: one folder of compiled programs, temporary files that go with this run."""
    shared = {
        "JAX_COMPILATION_CACHE_DIR": str(programs / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TORCHINDUCTOR_CACHE_DIR": str(programs / "inductor"),
        "TRITON_CACHE_DIR": str(programs / "triton"),
        "TMPDIR": str(scratch),
        "PYTHONUNBUFFERED": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # contenders share the device
    }
    return {**os.environ, **shared, **(SMALL_ON_CPU if tiny else {})}


def machine(env: dict[str, str]) -> dict[str, Any]:
    """Device, driver and versions, asked in a process of its own, so that this one never holds the device.

    Raises:
        UsageError: If JAX does not start there.
    """
    asked = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    if asked.returncode:
        lines = asked.stderr.strip().splitlines() or ["no message"]
        raise UsageError(f"JAX does not start: {lines[-1]}")
    told: dict[str, Any] = json.loads(asked.stdout.strip().splitlines()[-1])
    return told


def earlier(out: Path, device: str, tiny: bool) -> dict[str, Any]:
    """The parts that an earlier call left in this folder, by name.

    Raises:
        UsageError: If they were measured on another device, or in another size.
    """
    path = out / "summary.json"
    if not path.exists():
        return {}
    try:
        left = read_json(path)
        where, size, parts = left["machine"]["device"], left["tiny"], dict(left["parts"])
    except (CheckpointError, KeyError, TypeError, ValueError) as unfit:
        raise UsageError(f"{path}: not a summary of this benchmark ({unfit}); name another --out") from None
    if (where, size) != (device, tiny):
        raise UsageError(
            f"{path} holds figures of {where}{' with --tiny' if size else ''}, this is "
            f"{device}{' with --tiny' if tiny else ''}: name another --out"
        )
    return parts


def limit_of_first(parts: Sequence[Part], seconds: float, *, tiny: bool = False) -> float:
    """How long the first of these parts may take, of the seconds that are left for all of them.

    What a part may need at most is asked of a GPU, not of the CPU that `tiny` runs on.
    """
    first = parts[0]
    share = seconds * first.weight / sum(part.weight for part in parts)
    return share if first.at_most is None or tiny else min(share, first.at_most)


def table(parts: dict[str, Any]) -> str:
    """What each part came to, with its few figures, to print."""
    lines = [f"{'part':<12}{'':<13}{'s':>7}{'limit':>7}  figures"]
    for name, part in parts.items():
        limit = f"{part['limit_s']:.0f}" if "limit_s" in part else ""
        lines.append(
            f"{name:<12}{part['status']:<13}{part.get('seconds', 0):>7.1f}{limit:>7}  "
            f"{part.get('figures', 0)}{'; ' + part['why'] if 'why' in part else ''}"
        )
        for title, figure in part.get("headline", {}).items():
            shown = figure
            if isinstance(figure, dict):
                shown = ", ".join(f"{label} {value}" for label, value in figure.items())
            lines.append(f"            {title}: {shown}")
    return "\n".join(lines)


def measure(given: argparse.Namespace) -> int:
    """Run the parts and keep the summary up to date.

    Raises:
        UsageError: If there is no GPU, or the folder holds other figures.
    """
    began = time.monotonic()
    minutes = given.minutes or (10.0 if given.tiny else 8.0)
    given.out.mkdir(parents=True, exist_ok=True)
    device = "cpu" if given.tiny else "gpu"
    with tempfile.TemporaryDirectory(prefix="prime-jax-gpu-") as place:
        programs, scratch = (given.programs or Path(place) / "programs"), Path(place) / "scratch"
        programs.mkdir(mode=0o700, parents=True, exist_ok=True)
        scratch.mkdir()
        env = environment(programs.resolve(), scratch, given.tiny)
        missing = [name for name in NEEDED if find_spec(name) is None]
        for name in missing:
            print(f"not installed: {name} (needed for: {NEEDED[name]})")
        told = machine(env)
        if told["backend"] != device:
            raise UsageError(
                f"JAX finds no GPU here, only {told['machine']['device']}; --tiny runs everything on a CPU"
            )
        known = earlier(given.out, told["machine"]["device"], given.tiny)
        summary: dict[str, Any] = {
            **told,
            "tiny": given.tiny,
            "minutes": minutes,
            "began": datetime.now(UTC).isoformat(timespec="seconds"),
            "missing_packages": missing,
            "parts": {part.name: known[part.name] for part in PARTS if part.name in known},
        }
        print(f"{told['machine']['device']}, driver {told['machine'].get('driver')}, {told['versions']}")
        chosen = [part for part in PARTS if not given.only or part.name in given.only]
        done = {name for name, part in known.items() if part["status"] == "done" and not given.again}
        to_do = [part for part in chosen if part.name not in done]
        for number, part in enumerate(to_do):
            left = 60 * minutes - (time.monotonic() - began)
            limit = limit_of_first(to_do[number:], left, tiny=given.tiny)
            print(f"\n== {part.name}, at most {limit:.0f} s", flush=True)
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            found = run_part(part, given.out, device, limit, env, tiny=given.tiny)
            summary["parts"] = {
                each.name: found if each is part else summary["parts"][each.name]
                for each in PARTS
                if each is part or each.name in summary["parts"]
            }
            write_json(given.out / "summary.json", summary)
            print(table({part.name: found}), flush=True)
        write_json(given.out / "summary.json", summary)
    print(f"\n{table(summary['parts'])}\n{time.monotonic() - began:.0f} s of {60 * minutes:.0f}")
    return int(any(summary["parts"][part.name]["status"] == "failed" for part in chosen))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, help="for everything together (default 8; with --tiny 10)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--again", action="store_true", help="also the parts that are done already")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on a CPU")
    parser.add_argument("--programs", type=Path, metavar="DIR", help="keep compiled programs here")
    given = parser.parse_args(argv)
    if given.minutes is not None and not given.minutes > 0:
        parser.error(f"--minutes {given.minutes} is no time")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # the part that runs is ended too
    try:
        return measure(given)
    except UsageError as wrong:
        print(f"benchmarks.gpu: {wrong}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

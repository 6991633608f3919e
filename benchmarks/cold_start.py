"""How long a predictor takes until it answers: the first load on a machine, and the second.

    python -m benchmarks.cold_start --out benchmarks/results/cold_start_cpu.json [--tiny]

Writes random weights of the default 206M model into a temporary folder and loads them in fresh processes,
with an empty folder of compiled programs: once, then again with what the first load left there. Counts the
programs that JAX asked for, those that came from the folder, and the seconds to import, to load (weights,
choice of precision, programs) and to the first answer. Writes its file after each load.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import facts
from prime_jax.files import read_json, write_json
from prime_jax.progress import console

COUNTED = ("cache_hits", "cache_misses")
SECONDS = 900  # a load that takes longer is stopped, and its entry says so


def load(folder: Path, precision: Any) -> dict[str, Any]:
    """Load and answer once, in this process."""
    started = time.perf_counter()
    import numpy as np
    from jax import monitoring
    from safetensors.numpy import load_file

    from prime_jax.models import model_config
    from prime_jax.models.state_dict import load_state_dict
    from prime_jax.predict.predictor import Predictor

    counts = dict.fromkeys((*COUNTED, "programs"), 0)

    def count(event: str, **_: object) -> None:
        name = event.rsplit("/", 1)[-1]
        if name in COUNTED:
            counts[name] += 1

    def count_programs(event: str, duration_secs: float, **_: object) -> None:
        counts["programs"] += event.endswith("backend_compile_duration")

    monitoring.register_event_listener(count)
    monitoring.register_event_duration_secs_listener(count_programs)
    imported = time.perf_counter()
    config = model_config(read_json(folder / "config.json")["model"])
    predictor = Predictor.from_model(
        load_state_dict(config, load_file(folder / "model.safetensors")), precision=precision
    )
    loaded = time.perf_counter()
    vectors = np.ones((config.max_context_length + 1, config.input_dim), np.float32)
    predictor.predict(vectors[1:], vectors[0])
    return {
        "import_seconds": imported - started,
        "load_seconds": loaded - imported,
        "warm_up_seconds": predictor.info()["warmup_seconds"],
        "first_answer_seconds": time.perf_counter() - loaded,
        **counts,
        "precision": predictor.info()["precision"],
    }


def write(folder: Path, *, tiny: bool) -> None:
    """Random weights; written in a process of its own, so that this one holds no device."""
    from benchmarks.latency import write_model
    from prime_jax.models.prime import PredictorConfig

    small: dict[str, Any] = {"hidden_dim": 128, "num_layers": 1, "input_dim": 64, "output_dim": 64}
    folder.mkdir()
    write_model(folder, PredictorConfig(**small if tiny else {}), onnx=False)


def child(*arguments: str, cache: Path) -> dict[str, Any]:
    """This script in a process of its own, with a folder of compiled programs of its own."""
    environment = os.environ | {"PRIME_JAX_CACHE": str(cache)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-m", "benchmarks.cold_start", *arguments]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {"not_measured": f"did not end within {SECONDS} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
        return {"not_measured": lines[-1][:300]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="file of results, JSON")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load:
        print(json.dumps(load(given.load, given.precision)))
        return
    if given.write:
        write(given.write, tiny=given.tiny)
        print("{}")
        return
    if given.out is None:
        parser.error("--out is missing")
    tiny = ["--tiny"] if given.tiny else []
    results: dict[str, Any] = {"tiny": given.tiny, "precision": given.precision}
    with tempfile.TemporaryDirectory() as folder:
        model, cache = Path(folder) / "model", Path(folder) / "programs"
        results |= child("--write", str(model), *tiny, cache=Path(folder) / "other")
        for name in ("first", "second"):
            arguments = ("--load", str(model), "--precision", given.precision)
            results[name] = child(*arguments, cache=cache)
            write_json(given.out, results)
            console.print(name, {key: value for key, value in results[name].items() if key != "precision"})
    write_json(given.out, {**facts("jax", "jaxlib"), **results})


if __name__ == "__main__":
    main()

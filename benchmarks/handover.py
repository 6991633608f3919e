"""What is handed over, at full size: do the runtimes agree, and what do smaller files gain and lose?

    python -m benchmarks.handover --out benchmarks/results
    python -m benchmarks.handover --run runs/large --data runs/quickstart/data --out benchmarks/results

Without --run the default model of 206 million parameters is measured with random weights; with it, a trained
run, and the loss of retrieval quality as well. Precisions take turns, some calls each, so that a busy machine
slows all of them; medians and ratios are reported.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from benchmarks.common import facts
from prime_jax.export.evidence import gather_evidence
from prime_jax.export.golden import TOLERANCE, min_cosine
from prime_jax.export.quantize import PRECISIONS, Precision, file_of, quantize
from prime_jax.export.to_onnx import to_onnx
from prime_jax.export.to_torch import state_dict
from prime_jax.files import write_json
from prime_jax.models.prime import EmbeddingPredictor, PredictorConfig
from prime_jax.predict.predictor import Predictor, load

BATCHES = (1, 8, 32)
CHECKED = (1, 7, 64)
WARMING, CALLS = 3, 7
Inputs = dict[str, np.ndarray]


def requests(config: PredictorConfig, rows: int, turns: int | None = None, seed: int = 0) -> Inputs:
    """Random unit vectors; every row has `turns` real turns, or 0 to N in turn."""
    rng = np.random.default_rng(seed)
    N, D = config.max_context_length, config.input_dim
    vectors = rng.normal(size=(rows, N + 1, D)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    count = np.arange(rows)[:, None] % (N + 1) if turns is None else turns
    mask = np.broadcast_to(np.arange(N) < count, (rows, N)).copy()
    return {"context": vectors[:, :N].copy(), "context_mask": mask, "query": vectors[:, N].copy()}


def open_onnx(path: Path) -> Any:
    """A session on all cores."""
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def in_torch(model: EmbeddingPredictor) -> Any:
    """The same weights in the torch module of the bundle."""
    import torch

    from prime_jax.export import torch_runtime

    names = torch_runtime.PredictorConfig.__dataclass_fields__
    config = torch_runtime.PredictorConfig(**{name: getattr(model.config, name) for name in names})
    with torch.device("meta"):
        module = torch_runtime.EmbeddingPredictor(config)
    weights = {name: torch.from_numpy(tensor) for name, tensor in state_dict(model).items()}
    module.load_state_dict(weights, assign=True)
    return module.eval()


def parity(model: EmbeddingPredictor, session: Any, module: Any) -> dict[str, Any]:
    """Largest differences from JAX, for every number of turns at batch 1 and mixed ones in larger batches."""
    import torch

    predictor = Predictor.from_model(model, precision="float32", batch_sizes=CHECKED)
    cases = [requests(model.config, 1, turns, turns) for turns in range(model.config.max_context_length + 1)]
    cases += [requests(model.config, rows, seed=rows) for rows in CHECKED[1:]]
    found = {"onnxruntime": 0.0, "torch": 0.0}
    for inputs in cases:
        expected = predictor.predict(inputs["context"], inputs["query"], inputs["context_mask"])
        (onnx,) = session.run(["embedding"], inputs)
        with torch.inference_mode():
            order = ("context", "query", "context_mask")
            answers = module(*(torch.from_numpy(inputs[name]) for name in order)).numpy()
        for name, other in (("onnxruntime", onnx), ("torch", answers)):
            found[name] = max(found[name], float(np.abs(other - expected).max()))
    rows = sum(len(inputs["query"]) for inputs in cases)
    return {"tolerance": TOLERANCE, "rows": rows, "batches": list(CHECKED), "largest_difference": found}


def speed(sessions: Mapping[Precision, Any], config: PredictorConfig, rounds: int) -> dict[str, Any]:
    """Median milliseconds of each precision and batch, and the ratio to fp32 in the same rounds."""
    table: dict[str, Any] = {}
    for batch in BATCHES:
        inputs = requests(config, batch)
        times: dict[Precision, list[float]] = {name: [] for name in sessions}
        for _ in range(rounds):
            for name, session in sessions.items():
                times[name].append(_milliseconds(session, inputs))
        table[str(batch)] = {
            name: {
                "milliseconds": statistics.median(values),
                "times_faster_than_fp32": statistics.median(
                    plain / own for plain, own in zip(times["fp32"], values, strict=True)
                ),
            }
            for name, values in times.items()
        }
    return table


def _milliseconds(session: Any, inputs: Inputs) -> float:
    """Median of some calls, after the waiting threads of the session before have gone to sleep."""
    taken = []
    for _ in range(WARMING + CALLS):
        begun = time.perf_counter()
        session.run(["embedding"], inputs)
        taken.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(taken[WARMING:])


def measure(run: Path | None, data: Path | None, rounds: int) -> dict[str, Any]:
    """Everything, in a temporary folder."""
    predictor = None if run is None else load(run, precision="float32")
    model = PredictorConfig().build(rngs=nnx.Rngs(0)) if predictor is None else predictor.model
    if not isinstance(model, EmbeddingPredictor):
        sys.exit(f"this benchmark is for PRIME's transformer, not for a {model.config.kind} model")
    result: dict[str, Any] = {"parameters": model.num_params(), "model": model.config.model_dump()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begun = time.perf_counter()
        to_onnx(model, folder / "model.onnx")
        result["export_seconds"] = time.perf_counter() - begun
        for precision in PRECISIONS[1:]:
            quantize(folder / "model.onnx", folder / file_of(precision), precision)
        files = {precision: folder / file_of(precision) for precision in PRECISIONS}
        result["megabytes"] = {precision: path.stat().st_size / 1e6 for precision, path in files.items()}
        sessions = {precision: open_onnx(path) for precision, path in files.items()}
        result["parity"] = parity(model, sessions["fp32"], in_torch(model))
        inputs = requests(model.config, 64)
        exact = sessions["fp32"].run(["embedding"], inputs)[0]
        result["min_cosine"] = {
            precision: min_cosine(session.run(["embedding"], inputs)[0], exact)
            for precision, session in sessions.items()
        }
        result["speed"] = speed(sessions, model.config, rounds)
        if predictor is not None and run is not None and data is not None:
            del sessions
            evidence = gather_evidence(predictor, run, data)
            result["quality"] = {
                precision: evidence.judge(files["fp32"], files[precision]) for precision in PRECISIONS[1:]
            }
            result["leak_check"] = evidence.leak
    return result


def show(result: dict[str, Any]) -> None:
    """The figures as one would want to read them."""
    console = Console()
    found = result["parity"]
    console.print(
        f"{result['parameters']:,} parameters; {found['rows']} requests: ONNX Runtime differs from JAX by "
        f"{found['largest_difference']['onnxruntime']:.1e}, torch by "
        f"{found['largest_difference']['torch']:.1e}"
    )
    table = Table(
        "precision", "MB", "smallest cosine", *(f"batch {size}" for size in BATCHES), "loss of R@10"
    )
    for precision in PRECISIONS:
        cells = [result["speed"][str(batch)][precision] for batch in BATCHES]
        quality = result.get("quality", {}).get(precision)
        table.add_row(
            precision,
            f"{result['megabytes'][precision]:,.0f}",
            f"{result['min_cosine'][precision]:.5f}",
            *(f"{cell['milliseconds']:.1f} ms ({cell['times_faster_than_fp32']:.2f} x)" for cell in cells),
            f"{quality['loss']:.4f} [{quality['loss_interval'][0]:.4f}, {quality['loss_interval'][1]:.4f}]"
            if quality
            else "",
        )
    console.print(table)


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser("python -m benchmarks.handover", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, metavar="DIR", help="a trained run instead of random weights")
    parser.add_argument("--data", type=Path, metavar="DIR", help="its data, for the loss of quality")
    parser.add_argument("--rounds", type=int, default=8, help="of timing (default: 8)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where handover[_trained].json is written")
    given = parser.parse_args()
    result = measure(given.run, given.data, given.rounds)
    show(result)
    if given.out is not None:
        name = "handover.json" if given.run is None else "handover_trained.json"
        packages = ("jax", "jax2onnx", "onnx", "onnxruntime", "torch", "numpy")
        write_json(given.out / name, {**facts(*packages), "rounds": given.rounds, **result})
    worst = max(result["parity"]["largest_difference"].values())
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())

"""Golden inputs, and how closely each runtime gives the answers that JAX gives on them."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.errors import ExportError
from prime_jax.models.prime import EmbeddingPredictor, PredictorConfig

SEED = 0
TOLERANCE = 1e-5
Arrays = dict[str, np.ndarray[Any, np.dtype[Any]]]


def golden_inputs(config: PredictorConfig) -> Arrays:
    """Seeded requests, one for every number of real turns from 0 to N: unit vectors around a common topic.

    Every second row has its padding in front instead of behind, and padded slots hold vectors like the
    others, so that a consumer who forgets the mask gets wrong numbers.
    """
    rng = np.random.default_rng(SEED)
    N = config.max_context_length
    rows, D = N + 1, config.input_dim
    topic = rng.normal(size=(rows, 1, D))
    vectors = topic + rng.normal(size=(rows, N + 1, D))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    mask = np.arange(N) < np.arange(rows)[:, None]
    mask[1::2] = mask[1::2, ::-1]
    vectors = vectors.astype(np.float32)
    return {"context": vectors[:, :N].copy(), "context_mask": mask, "query": vectors[:, N].copy()}


def jax_answers(model: EmbeddingPredictor, inputs: Arrays) -> np.ndarray[Any, np.dtype[np.float32]]:
    """What JAX predicts, with exact float32 products on every device, `[G, E]`."""
    arrays = {name: jnp.asarray(array) for name, array in inputs.items()}
    with jax.default_matmul_precision("highest"):
        return np.asarray(model(arrays["context"], arrays["query"], arrays["context_mask"]))


def compare(golden: Arrays, bundle: Path) -> dict[str, Any]:
    """Run the golden inputs through every runtime installed here, from the files of the bundle.

    Args:
        golden: Inputs and JAX's `embedding`.
        bundle: A complete bundle folder.

    Returns:
        What parity.json holds; a runtime that is not installed is reported as not checked.

    Raises:
        ExportError: If a runtime differs by more than the tolerance.
    """
    runtimes: dict[str, Callable[[Arrays, Path], Any]]
    runtimes = {"onnxruntime": onnxruntime_answers, "torch": torch_answers}
    parity: dict[str, Any] = {"tolerance": TOLERANCE, "rows": len(golden["embedding"])}
    for name, run in runtimes.items():
        try:
            answers = run(golden, bundle)
        except ModuleNotFoundError as missing:
            if missing.name != name:
                raise
            parity[name] = {"checked": False, "why": f"{name} is not installed"}
            continue
        parity[name] = _agreement(name, answers, golden["embedding"])
    return parity


def min_cosine(answers: np.ndarray[Any, np.dtype[Any]], expected: np.ndarray[Any, np.dtype[Any]]) -> float:
    """Smallest cosine between rows that should be equal."""
    left, right = answers.astype(np.float64), expected.astype(np.float64)
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return float(((left * right).sum(axis=1) / lengths).min())


def _agreement(
    name: str, answers: np.ndarray[Any, np.dtype[Any]], expected: np.ndarray[Any, np.dtype[Any]]
) -> dict[str, Any]:
    difference = float(np.abs(answers - expected).max())
    if not difference <= TOLERANCE:  # NaN differs too
        raise ExportError(
            f"{name} differs from JAX by {difference:.2g} on the golden inputs, allowed is {TOLERANCE:g}; "
            "nothing was written"
        )
    return {
        "checked": True,
        "version": importlib.metadata.version(name),
        "max_abs_difference": difference,
        "min_cosine": min_cosine(answers, expected),
    }


def onnxruntime_answers(
    golden: Arrays, bundle: Path, file: str = "model.onnx"
) -> np.ndarray[Any, np.dtype[Any]]:
    """What an ONNX file of the bundle predicts for the golden inputs, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(bundle / file, providers=["CPUExecutionProvider"])
    feeds = {given.name: golden[given.name] for given in session.get_inputs()}
    return np.asarray(session.run(["embedding"], feeds)[0])


def torch_answers(
    golden: Arrays, bundle: Path, runtime: Path | None = None
) -> np.ndarray[Any, np.dtype[Any]]:
    """What the bundle's weights predict for the golden inputs in its own torch module, or in another one."""
    import torch

    model = module_of(runtime or bundle / "torch_runtime.py").load_bundle(bundle)
    inputs = [torch.from_numpy(golden[name]) for name in ("context", "query", "context_mask")]
    with torch.inference_mode():
        return np.asarray(model(*inputs).numpy())


def module_of(path: Path) -> ModuleType:
    """A torch_runtime.py as a module, without leaving a compiled copy beside it."""
    module = ModuleType("torch_runtime")
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), module.__dict__)
    return module

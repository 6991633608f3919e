"""Golden inputs, and how closely each runtime gives the answers that JAX gives on them."""

import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.errors import ExportError
from prime_jax.export.interface import INPUTS, OUTPUTS
from prime_jax.models import AnyConfig, Model
from prime_jax.models.jasper import SteeredConfig
from prime_jax.models.prime import EmbeddingPredictor

SEED = 0
TOLERANCE = 1e-5
STEERED_ROWS = 16
Arrays = dict[str, np.ndarray[Any, np.dtype[Any]]]


def golden_inputs(config: AnyConfig) -> Arrays:
    """Seeded requests, one for every number of real turns from 0 to N: unit vectors around a common topic.

    Every second row has its padding in front instead of behind, and padded slots hold vectors like the
    others, so that a consumer who forgets the mask gets wrong numbers. A steered model gets 16 questions, the
    even ones without steering.
    """
    rng = np.random.default_rng(SEED)
    N, D = config.max_context_length, config.input_dim
    rows = STEERED_ROWS if isinstance(config, SteeredConfig) else N + 1
    topic = rng.normal(size=(rows, 1, D))
    vectors = topic + rng.normal(size=(rows, N + 1, D))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    mask = np.arange(N) < np.arange(rows)[:, None] % (N + 1)
    mask[1::2] = mask[1::2, ::-1]
    vectors = vectors.astype(np.float32)
    return {"context": vectors[:, :N].copy(), "context_mask": mask, "query": vectors[:, N].copy()}


def jax_answers(model: Model, inputs: Arrays) -> Arrays:
    """What JAX predicts, with exact float32 products on every device, by name of the output."""
    given = [jnp.asarray(inputs[name]) for name in ("context", "query", "context_mask")]
    with jax.default_matmul_precision("highest"):
        if isinstance(model, EmbeddingPredictor):
            return {"embedding": np.asarray(model(*given))}
        return _named(model.details(*given)._asdict())


def _named(found: Mapping[str, Any]) -> Arrays:
    """The outputs among what a model says of a prediction."""
    return {name: np.asarray(found[name]) for name in OUTPUTS if found.get(name) is not None}


def compare(golden: Arrays, bundle: Path) -> dict[str, Any]:
    """Run the golden inputs through every runtime installed here, from the files of the bundle.

    Args:
        golden: Inputs, and JAX's `embedding` and further outputs.
        bundle: A complete bundle folder.

    Returns:
        What parity.json holds; a runtime that is not installed is reported as not checked. Where the model
        has further outputs, `max_abs_difference` is the largest of all, and `outputs` has each by name.

    Raises:
        ExportError: If a runtime differs by more than the tolerance, lacks an output, or chooses another
            subspace.
    """
    runtimes: dict[str, Callable[[Arrays, Path], Arrays]]
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
        parity[name] = _agreement(name, answers, golden)
    return parity


def differences(answers: Arrays, golden: Arrays) -> dict[str, float]:
    """Largest difference of each output to the golden answers.

    Raises:
        ExportError: If one has an output that the other lacks; the message names it.
    """
    for name in sorted(answers.keys() ^ (golden.keys() - set(INPUTS))):
        lacking = "the runtime gives none" if name in golden else "the golden answers have none"
        raise ExportError(f"output {name!r}: {lacking}")
    return {name: float(np.abs(answers[name] - golden[name]).max()) for name in answers}


def same_choice(answers: Arrays, golden: Arrays) -> float:
    """Share of golden requests whose routing puts most weight on the same subspace."""
    return float(np.mean(answers["routing"].argmax(axis=1) == golden["routing"].argmax(axis=1)))


def min_cosine(answers: np.ndarray[Any, np.dtype[Any]], expected: np.ndarray[Any, np.dtype[Any]]) -> float:
    """Smallest cosine between rows that should be equal."""
    left, right = answers.astype(np.float64), expected.astype(np.float64)
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return float(((left * right).sum(axis=1) / lengths).min())


def _agreement(runtime: str, answers: Arrays, golden: Arrays) -> dict[str, Any]:
    found = differences(answers, golden)
    for name, difference in found.items():
        if not difference <= TOLERANCE:  # NaN differs too
            raise ExportError(
                f"{runtime} differs from JAX by {difference:.2g} in {name} on the golden inputs, allowed is "
                f"{TOLERANCE:g}; nothing was written"
            )
    if "routing" in answers and same_choice(answers, golden) < 1:
        raise ExportError(
            f"{runtime} chooses another subspace than JAX on a golden input; nothing was written"
        )
    parity: dict[str, Any] = {
        "checked": True,
        "version": importlib.metadata.version(runtime),
        "max_abs_difference": max(found.values()),
        "min_cosine": min_cosine(answers["embedding"], golden["embedding"]),
    }
    if len(found) > 1:
        parity["outputs"] = {name: {"max_abs_difference": worst} for name, worst in found.items()}
        parity["outputs"]["routing"]["same_choice"] = True
    return parity


def open_session(path: Path) -> Any:
    """An ONNX file in ONNX Runtime, on the CPU.

    Raises:
        ModuleNotFoundError: If onnxruntime is not installed.
    """
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def onnxruntime_answers(golden: Arrays, bundle: Path, file: str = "model.onnx") -> Arrays:
    """What an ONNX file of the bundle answers to the golden inputs on the CPU, by name of the output."""
    session = open_session(bundle / file)
    feeds = {given.name: golden[given.name] for given in session.get_inputs()}
    names = [given.name for given in session.get_outputs()]
    return {name: np.asarray(answer) for name, answer in zip(names, session.run(names, feeds), strict=True)}


def torch_answers(golden: Arrays, bundle: Path, source: str | None = None) -> Arrays:
    """What the bundle's weights answer to the golden inputs in its own torch module, or in another source."""
    import torch

    path = bundle / "torch_runtime.py"
    model = module_of(source or path.read_text("utf-8"), str(path)).load_bundle(bundle)
    inputs = [torch.from_numpy(golden[name]) for name in ("context", "query", "context_mask")]
    with torch.inference_mode():
        if not hasattr(model, "details"):
            return {"embedding": np.asarray(model(*inputs).numpy())}
        return _named(model.details(*inputs)._asdict())


def module_of(source: str, place: str) -> ModuleType:
    """The source of a torch_runtime.py as a module, without leaving a compiled copy beside it."""
    module = ModuleType("torch_runtime")
    exec(compile(source, place, "exec"), module.__dict__)
    return module

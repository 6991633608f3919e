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
from prime_jax.export.interface import OUTPUTS, Arrays, Interface
from prime_jax.export.interfaces import interface_of
from prime_jax.models import AnyConfig, Model
from prime_jax.models.bundle import read_config

TOLERANCE = 1e-5


def golden_inputs(config: AnyConfig) -> Arrays:
    """Seeded requests to a model of this kind (`Interface.golden_inputs`)."""
    return interface_of(config).golden_inputs()


def jax_answers(model: Model, inputs: Arrays) -> Arrays:
    """What JAX predicts, with exact float32 products on every device, by name of the output."""
    given = {name: jnp.asarray(array) for name, array in inputs.items()}
    with jax.default_matmul_precision("highest"):
        found = interface_of(model.config).predict(model, given)
    return {name: np.asarray(answer) for name, answer in found.items()}


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
    for name in sorted(answers.keys() ^ (golden.keys() & set(OUTPUTS))):
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


def torch_answers(
    golden: Arrays, bundle: Path, source: str | None = None, interface: Interface | None = None
) -> Arrays:
    """What the bundle's weights answer to the golden inputs in its own torch module, or in another source.

    Args:
        golden: Inputs; answers in it are not looked at.
        bundle: The folder.
        source: Of the module; None means the bundle's.
        interface: How its models are called; None asks its config.json.
    """
    import torch

    path = bundle / "torch_runtime.py"
    model = module_of(source or path.read_text("utf-8"), str(path)).load_bundle(bundle)
    interface = interface or interface_of(read_config(bundle))
    inputs = {name: torch.from_numpy(golden[name]) for name in interface.names}
    with torch.inference_mode():
        found = interface.predict_in_torch(model, inputs)
    return {name: np.asarray(answer.numpy()) for name, answer in found.items()}


def module_of(source: str, place: str) -> ModuleType:
    """The source of a torch_runtime.py as a module, without leaving a compiled copy beside it."""
    module = ModuleType("torch_runtime")
    exec(compile(source, place, "exec"), module.__dict__)
    return module

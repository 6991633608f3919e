"""A bundle: everything a consumer needs who never installs JAX, in one folder that proves itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array

from prime_jax._version import __version__
from prime_jax.errors import CheckpointError, ExportError
from prime_jax.export.golden import compare, golden_inputs, jax_answers
from prime_jax.export.model_card import model_card
from prime_jax.export.to_onnx import to_onnx
from prime_jax.export.to_torch import load_state_dict, state_dict
from prime_jax.files import atomic_folder, read_json, write_bytes, write_json, write_manifest, write_text
from prime_jax.models.prime import EmbeddingPredictor
from prime_jax.predict.predictor import TARGET_HEAD, Predictor

KIND = "bundle"
INPUT_FACTS = ("encoder", "query_prefix", "passage_prefix", "context_from", "first_pass_k")
FACTS = (*INPUT_FACTS, "step", "epoch", "metrics", "data_hash", "versions")


def write_bundle(
    model: EmbeddingPredictor,
    folder: Path,
    *,
    facts: Mapping[str, Any],
    target_head: Array | None = None,
) -> dict[str, Any]:
    """Write a bundle, after the exported files gave JAX's numbers on golden inputs.

    The folder appears only when it is complete; the same model and facts give the same bytes.

    Args:
        model: The model; its weights are exported in float32.
        folder: Where to write. A bundle that is already there is replaced, anything else is not.
        facts: Where the model comes from, as far as known: `encoder` (identity), `query_prefix`,
            `passage_prefix`, `context_from`, `first_pass_k`, `step`, `epoch`, `metrics`, `data_hash`,
            `versions`, and `report` (the values of report.json).
        target_head: Kernel that the memory is mapped by before it is searched (`Predictor.target_head`).

    Returns:
        What parity.json holds.

    Raises:
        ExportError: If a weight is NaN or Inf, a package is missing, `folder` holds something else, or a
            runtime differs from JAX by more than 1e-5. Nothing is written then.
    """
    _check_free(folder)
    tensors = state_dict(model)
    try:
        model = load_state_dict(model.config, tensors)  # refuses NaN; computes in float32 whatever it was
    except CheckpointError as unfit:
        raise ExportError(f"the model cannot be exported: {unfit}") from None
    golden = golden_inputs(model.config)
    golden["embedding"] = jax_answers(model, golden)
    known = {name: facts[name] for name in FACTS if name in facts}
    with atomic_folder(folder) as part:
        write_json(part / "config.json", _config(model, known))
        write_bytes(part / "torch_runtime.py", Path(__file__).with_name("torch_runtime.py").read_bytes())
        _write_safetensors(part / "model.safetensors", tensors)
        _write_safetensors(part / "golden.safetensors", golden)
        if target_head is not None:
            _write_safetensors(part / TARGET_HEAD, {"kernel": np.asarray(target_head)})
        to_onnx(model, part / "model.onnx")
        write_manifest(
            part, KIND, prime_jax=__version__, **known
        )  # torch_runtime opens complete bundles only
        parity = compare(golden, part)
        write_json(part / "parity.json", parity)
        write_text(
            part / "MODEL_CARD.md",
            model_card(
                model.config, model.num_params(), facts, parity, memory_mapped=target_head is not None
            ),
        )
        write_manifest(part, KIND, prime_jax=__version__, **known)
    return parity


def facts_of(predictor: Predictor, source: Path) -> dict[str, Any]:
    """What is known about a loaded predictor, for `write_bundle`.

    Args:
        predictor: As `load(source)` gave it.
        source: Run folder, checkpoint or bundle; the figures of `report/report.json` in it are taken along.

    Raises:
        ExportError: If that report describes another checkpoint.
    """
    info = predictor.info()
    facts = {name: info[name] for name in FACTS if name in info}
    if predictor.config is not None:
        data = predictor.config.data.model_dump()
        facts |= {name: data[name] for name in INPUT_FACTS if name != "encoder"}  # info has its identity
    path = source / "report" / "report.json"
    if path.is_file():
        facts["report"] = read_json(path, ExportError)
        step = facts["report"].get("run", {}).get("step", facts.get("step"))
        if step != facts.get("step"):
            raise ExportError(
                f"{path}: describes step {step}, but the checkpoint is of step {facts.get('step')}; "
                "evaluate again, or remove the report"
            )
    return facts


def _check_free(folder: Path) -> None:
    """Refuse to replace anything but an older bundle."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ExportError(f"{folder}: is a file; name a folder for the bundle")
    if any(folder.iterdir()):
        manifest = folder / "manifest.json"
        if not manifest.is_file() or read_json(manifest, ExportError).get("kind") != KIND:
            raise ExportError(f"{folder}: holds something that is not a bundle; name another folder")


def _config(model: EmbeddingPredictor, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json holds."""
    config = model.config
    N, D, E = config.max_context_length, config.input_dim, config.output_dim
    return {
        "model": {**config.model_dump(), "checkpoint_path": None},  # that is where its training started
        "inputs": {
            "context": {"dtype": "float32", "shape": ["B", N, D]},
            "context_mask": {"dtype": "bool", "shape": ["B", N]},
            "query": {"dtype": "float32", "shape": ["B", D]},
        },
        "output": {"embedding": {"dtype": "float32", "shape": ["B", E], "normalised": True}},
        **{name: facts[name] for name in INPUT_FACTS if name in facts},
    }


def _write_safetensors(path: Path, tensors: Mapping[str, np.ndarray[Any, np.dtype[Any]]]) -> None:
    from safetensors.numpy import save_file

    save_file(dict(tensors), path)
    path.chmod(0o644)

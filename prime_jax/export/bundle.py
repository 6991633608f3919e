"""A bundle: everything a consumer needs who never installs JAX, in one folder that proves itself."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array

from prime_jax._version import __version__
from prime_jax.errors import CheckpointError, ExportError
from prime_jax.export.batch_independence import batch_independence
from prime_jax.export.evidence import MAX_LOSS, METRIC, Evidence
from prime_jax.export.golden import (
    compare,
    golden_inputs,
    jax_answers,
    min_cosine,
    onnxruntime_answers,
    same_choice,
)
from prime_jax.export.interface import Arrays, Interface, Tensor
from prime_jax.export.interfaces import interface_of
from prime_jax.export.model_card import model_card
from prime_jax.export.optional import need
from prime_jax.export.quantize import Precision, file_of, quantize
from prime_jax.export.signing import sign
from prime_jax.export.text import write_encoders
from prime_jax.export.to_onnx import OPSET, to_onnx
from prime_jax.export.to_torch import load_state_dict, state_dict
from prime_jax.files import atomic_folder, read_json, sha256, write_json, write_text
from prime_jax.manifest import FIRST_VERSION, MANIFEST, check_version, write_manifest
from prime_jax.models import AnyConfig, Model
from prime_jax.models.bundle import KIND, TARGET_HEAD
from prime_jax.models.confidence import Confidence, write_confidence
from prime_jax.models.layers import LLAMA_ONLY
from prime_jax.models.prime import EmbeddingPredictor
from prime_jax.predict.predictor import Predictor

INPUT_FACTS = ("encoder", "query_prefix", "passage_prefix", "context_from", "first_pass_k", "steering")
CONFIG_FACTS = (*INPUT_FACTS, "subspaces")  # what config.json says beside the model
FACTS = (*CONFIG_FACTS, "step", "epoch", "metrics", "data_hash", "versions", "licence", "attribution")


@dataclass(frozen=True)
class Options:
    """What a bundle holds besides its necessary files.

    Attributes:
        precisions: Of the ONNX files; fp32 is always there. The others need evidence.
        opset: Version of ONNX's operators, 17 to 23.
        model_version: Semantic version of the model, for the manifest.
        licence: Terms of the weights, for the card.
        state_dict: Whether to add model.pt, the weights as `torch.save` writes them.
        max_loss: By how much R@10 on the validation split may be lower in a lower precision.
        allow_loss: Write a precision that loses more all the same; the card says so.
        private_key: PEM file to sign with, or None.
        password: Of that key, where it is encrypted.
    """

    precisions: tuple[Precision, ...] = ("fp32",)
    opset: int = OPSET
    model_version: str = FIRST_VERSION
    licence: str | None = None
    state_dict: bool = False
    max_loss: float = MAX_LOSS
    allow_loss: bool = False
    private_key: Path | None = None
    password: str | None = None


def write_bundle(
    model: Model,
    folder: Path,
    *,
    facts: Mapping[str, Any],
    target_head: Array | None = None,
    confidence: Confidence | None = None,
    options: Options | None = None,
    evidence: Evidence | None = None,
    encoder: Path | None = None,
    source: Path | None = None,
) -> dict[str, Any]:
    """Write a bundle, after the exported files gave JAX's numbers on golden inputs.

    The folder appears only when it is complete; the same model, facts and evidence give the same bytes (but
    for a signature, which holds random numbers).

    Args:
        model: The model; its weights are exported in float32.
        folder: Where to write. A bundle that is already there is replaced, anything else is not.
        facts: Where the model comes from, as far as known: `encoder` (identity), `query_prefix`,
            `passage_prefix`, `context_from`, `first_pass_k`, `steering` (the variant that a steered model was
            judged with), `step`, `epoch`, `metrics`, `data_hash`, `versions`, and `report` (the values of
            report.json).
        target_head: Kernel that the memory is mapped by before it is searched (`Predictor.target_head`).
        confidence: How far its predictions can be trusted (`Predictor.confidence`).
        options: What else it holds.
        evidence: Validation data to judge lower precisions on, and the result of the leak check.
        encoder: Folder of the encoders that were trained with the model, to be carried along.
        source: Folder that the model was read from; a text model's tokenizer is copied from it.

    Returns:
        What parity.json holds.

    Raises:
        ExportError: If a weight is NaN or Inf, all centroids are zero, a package is missing, `folder` holds
            something else, `source` lacks a file that the model needs, a runtime differs from JAX by more
            than 1e-5 in any output, a lower precision has no evidence or loses more than allowed, or an
            answer depends on the rest of its batch. Nothing is written then.
        PredictorError: If the model version is not a semantic version.
    """
    options = options or Options()
    check_version(options.model_version)
    _check_free(folder)
    if len(options.precisions) > 1 and evidence is None:
        raise ExportError(
            f"{options.precisions[-1]} is only written with what it loses on validation data; "
            "name the data folder with --data"
        )
    interface = interface_of(model.config)
    interface.check(model)
    interface.check_files(source)
    tensors = state_dict(model)
    try:
        model = load_state_dict(model.config, tensors)  # refuses NaN; computes in float32 whatever it was
    except CheckpointError as unfit:
        raise ExportError(f"the model cannot be exported: {unfit}") from None
    golden = golden_inputs(model.config)
    golden |= jax_answers(model, golden)
    known = {name: facts[name] for name in FACTS if name in facts}
    with atomic_folder(folder) as part:
        write_json(part / "config.json", _config(interface, known))
        write_text(part / "torch_runtime.py", interface.torch_source())
        for name in interface.files:
            assert source is not None
            shutil.copyfile(source / name, part / name)
        _write_safetensors(part / "model.safetensors", tensors)
        _write_safetensors(part / "golden.safetensors", golden)
        if options.state_dict:
            _write_state_dict(part / "model.pt", tensors)
        if target_head is not None:
            _write_safetensors(part / TARGET_HEAD, {"kernel": np.asarray(target_head)})
        if confidence is not None:
            write_confidence(part, confidence)
        proof = {"model_version": options.model_version, "weights_sha256": sha256(part / "model.safetensors")}
        proof |= {name: known[name] for name in ("data_hash", "encoder") if name in known}
        to_onnx(model, part / "model.onnx", opset=options.opset, facts=proof)
        texts = None
        if encoder is not None and isinstance(model, EmbeddingPredictor):
            texts = write_encoders(model, encoder, part, options.opset)
        told = {
            "prime_jax": __version__,
            "model_version": options.model_version,
            "onnx": {name: file_of(name) for name in options.precisions},
            **known,
        }
        write_manifest(part, KIND, **told)  # torch_runtime opens complete bundles only
        parity = compare(golden, part)
        lower = {name: _lower(part, golden, name, options, evidence) for name in options.precisions[1:]}
        if parity["onnxruntime"]["checked"]:
            parity["batch_independence"] = batch_independence(interface, golden, part, told["onnx"])
        if lower:
            parity["precisions"] = lower
        if texts is not None:
            parity["text"] = texts
        if evidence is not None:
            parity["leak_check"] = evidence.leak
        write_json(part / "parity.json", parity)
        write_text(
            part / "MODEL_CARD.md",
            model_card(
                interface,
                model.num_params(),
                facts,
                parity,
                options.model_version,
                _terms(options.licence, facts),
                memory_mapped=target_head is not None,
            ),
        )
        write_manifest(part, KIND, **told)
        if options.private_key is not None:
            sign(part, options.private_key, options.password)
    return parity


def _terms(licence: str | None, facts: Mapping[str, Any]) -> str | None:
    """What the card says of the weights' licence: what is given, and what they came with."""
    words = (licence, facts.get("licence"), facts.get("attribution"))
    return "; ".join(dict.fromkeys(word for word in words if word)) or None


def _lower(
    bundle: Path, golden: Arrays, precision: Precision, options: Options, evidence: Evidence | None
) -> dict[str, Any]:
    """Write one lower precision and say what it loses; more than is allowed is refused."""
    assert evidence is not None
    path = bundle / file_of(precision)
    quantize(bundle / "model.onnx", path, precision)
    answers = onnxruntime_answers(golden, bundle, path.name)
    found = evidence.judge(bundle / "model.onnx", path)
    if not found["loss"] <= options.max_loss and not options.allow_loss:
        low, high = found["loss_interval"]
        raise ExportError(
            f"{precision} loses {found['loss']:.4f} of {METRIC} on the {found['split']} split (95% interval "
            f"{low:.4f} to {high:.4f}), allowed is {options.max_loss:g}; leave {precision} out, or accept "
            "it with --allow-loss"
        )
    kept = {"golden_min_cosine": min_cosine(answers["embedding"], golden["embedding"])}
    if "routing" in answers:
        kept["golden_same_choice"] = same_choice(answers, golden)
    return {**kept, **found}


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
        facts |= {name: data[name] for name in INPUT_FACTS if name in data and name != "encoder"}
        if predictor.config.steered:
            facts["steering"] = predictor.config.steering.judge_with
    path = source / "report" / "report.json"
    if path.is_file():
        report = facts["report"] = read_json(path, ExportError)
        if not isinstance(report, dict) or not isinstance(report.get("run"), dict):
            raise ExportError(f"{path}: not a report of this library; evaluate again, or remove it")
        step = report["run"].get("step", facts.get("step"))
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
        manifest = folder / MANIFEST
        found = read_json(manifest, ExportError) if manifest.is_file() else None
        if not isinstance(found, dict) or found.get("kind") != KIND:
            raise ExportError(f"{folder}: holds something that is not a bundle; name another folder")


def _config(interface: Interface, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json holds."""
    outputs = {output.name: _described(output) for output in interface.outputs}
    outputs["embedding"]["normalised"] = True
    return {
        "model": _model(interface.config),
        "inputs": {given.name: _described(given) for given in interface.inputs},
        "output": outputs,
        **{name: facts[name] for name in CONFIG_FACTS if name in facts},
    }


def _model(config: AnyConfig) -> dict[str, Any]:
    """The model's settings, without where its training started, and without those of layers it has not."""
    fields = {**config.model_dump(), "checkpoint_path": None}
    for name in LLAMA_ONLY if fields.get("block") == "gelu" else ("init_from",):
        fields.pop(name, None)
    return fields


def _described(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": tensor.dtype, "shape": ["B", *tensor.sizes]}


def _write_safetensors(path: Path, tensors: Mapping[str, np.ndarray[Any, np.dtype[Any]]]) -> None:
    from safetensors.numpy import save_file

    save_file(dict(tensors), path)
    path.chmod(0o644)


def _write_state_dict(path: Path, tensors: Mapping[str, np.ndarray[Any, np.dtype[Any]]]) -> None:
    torch = need("torch", "torch")
    with path.open("wb") as stream:  # with a path, its name would be in the bytes
        torch.save({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, stream)

"""A model repository for NVIDIA Triton Inference Server, made from a bundle.

    models/prime_predictor/config.pbtxt
    models/prime_predictor/1/model.onnx

One model for each precision of the bundle; the name of all but fp32 ends in the precision. Requests are
batched by the server as they come (dynamic batching); a row is answered alike in any batch. Texts
are joined where they are padded to the same length.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prime_jax.errors import ExportError
from prime_jax.export.quantize import PRECISIONS, file_of
from prime_jax.files import atomic_folder, read_json, write_text
from prime_jax.manifest import verify_manifest

NAME = "prime_predictor"
MAX_BATCH = 64
MAX_DELAY = 2000  # microseconds that a request waits for company
_TYPES = {"float32": "TYPE_FP32", "int32": "TYPE_INT32", "bool": "TYPE_BOOL"}


def write_repository(bundle: Path, folder: Path) -> list[str]:
    """Write a model repository of every ONNX file of a bundle, and return the names of its models.

    Args:
        bundle: A verified bundle.
        folder: The repository; models of these names in it are replaced, others stay.

    Raises:
        CheckpointError: If the bundle is damaged.
        ExportError: If `folder` is a file, or holds models of these names that this command did not write; or
            if the bundle's int8 file shares scales in a batch, as those of older versions do.
    """
    manifest = verify_manifest(bundle, "bundle")
    config = read_json(bundle / "config.json")
    if folder.is_file():
        raise ExportError(f"{folder}: is a file; name a folder for the model repository")
    name_of = {
        one: NAME if one == "fp32" else f"{NAME}_{one}" for one in manifest["onnx"] if one in PRECISIONS
    }
    for name in name_of.values():
        _check_ours(folder / name)
    if "int8" in name_of and read_json(bundle / "parity.json").get("batch_independence") is None:
        raise ExportError(
            f"{bundle}: its int8 file is of an older version, in which requests of one batch change each "
            "other's answers; export it again"
        )
    for precision, name in name_of.items():
        with atomic_folder(folder / name) as part:
            version = part / "1"
            version.mkdir()
            source = file_of(precision)
            shutil.copyfile(bundle / source, version / "model.onnx")
            if (bundle / f"{source}.data").is_file():  # the graph looks for it by this name
                shutil.copyfile(bundle / f"{source}.data", version / f"{source}.data")
            write_text(part / "config.pbtxt", model_config(name, config))
    return list(name_of.values())


def _check_ours(target: Path) -> None:
    """Refuse to replace what another hand made, such as a second version of the model."""
    if not target.exists() and not target.is_symlink():
        return
    plain = target.is_dir() and not target.is_symlink()
    if not plain or {entry.name for entry in target.iterdir()} - {"1", "config.pbtxt"}:
        raise ExportError(f"{target}: holds something else than this command writes; name another repository")


def model_config(name: str, config: Mapping[str, Any]) -> str:
    """The config.pbtxt of one model, from a bundle's config.json."""
    inputs = [_tensor("input", key, facts) for key, facts in config["inputs"].items()]
    outputs = [_tensor("output", key, facts) for key, facts in config["output"].items()]
    return "\n".join(
        [
            f'name: "{name}"',
            'backend: "onnxruntime"',
            f"max_batch_size: {MAX_BATCH}",
            *inputs,
            *outputs,
            "dynamic_batching {",
            "  preferred_batch_size: [ 8, 32 ]",
            f"  max_queue_delay_microseconds: {MAX_DELAY}",
            "}",
            "",
        ]
    )


def _tensor(kind: str, name: str, facts: Mapping[str, Any]) -> str:
    free = (-1 if isinstance(size, str) else size for size in facts["shape"][1:])  # Triton adds the batch
    sizes = ", ".join(map(str, free))
    return f'{kind} {{\n  name: "{name}"\n  data_type: {_TYPES[facts["dtype"]]}\n  dims: [ {sizes} ]\n}}'

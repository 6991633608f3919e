"""Opening a bundle with the standard library: every file checked first, nothing of it run before that.

The scripts beside this file share it; copy it into your own service as it is.
"""

import hashlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

FORMATS = (1, 2)
NEEDED = ("config.json", "golden.safetensors", "model.onnx", "model.safetensors", "torch_runtime.py")
UNLISTED = ("manifest.json", "model.sig")


class BundleError(Exception):
    """A bundle is missing, damaged, changed, or lacks what is asked for; the message names the file."""


def verify(bundle: Path) -> dict[str, Any]:
    """Check every file of a bundle against its manifest, and return that.

    Raises:
        BundleError: If the manifest or any file is missing, damaged or changed, lies elsewhere, or a file was
            added.
    """
    where = bundle / "manifest.json"
    try:
        text = where.read_text("utf-8")
        manifest = json.loads(text)
        files, rest = manifest["files"], {key: fact for key, fact in manifest.items() if key != "sha256"}
        digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
        written = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        sealed = manifest["sha256"] == digest and text == written
        known = manifest["kind"] == "bundle" and manifest["format_version"] in FORMATS
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as broken:
        raise BundleError(f"{where}: not the manifest of a bundle ({broken})") from None
    if not sealed:
        raise BundleError(f"{where}: damaged or changed, it differs from its own SHA-256")
    if not known or not set(NEEDED) <= set(files):
        raise BundleError(f"{where}: not the manifest of a whole bundle of format 1 or 2")
    manifest.setdefault("onnx", {"fp32": "model.onnx"})  # in format 1
    for name in manifest["onnx"].values():
        if name not in files:
            raise BundleError(f"{where}: names {name!r} but does not list it")
    for path in bundle.rglob("*"):
        name = path.relative_to(bundle).as_posix()
        if path.is_symlink():  # what a folder's link leads to would not be looked at
            raise BundleError(f"{path}: a link; a bundle holds its files itself")
        if path.is_file() and name not in files and name not in UNLISTED:
            why = "delete it, import with python -B" if ".pyc" in path.name else "the bundle was changed"
            raise BundleError(f"{path}: not listed in manifest.json; {why}")
    for name, facts in files.items():
        file = bundle / name
        if Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name:
            raise BundleError(f"{where}: the path {name!r} leaves the folder")
        if not file.is_file() or file_sha256(file) != facts["sha256"]:
            raise BundleError(f"{file}: missing or damaged")
    return dict(manifest)


def onnx_file(bundle: Path, manifest: dict[str, Any], precision: str) -> Path:
    """The bundle's ONNX file of a precision.

    Raises:
        BundleError: If it has none.
    """
    if precision not in manifest["onnx"]:
        raise BundleError(f"{bundle}: has no {precision} file; export it with --precision {precision}")
    return bundle / str(manifest["onnx"][precision])


def config_of_embeddings(bundle: Path) -> dict[str, Any]:
    """The bundle's config.json, of a model that takes embeddings.

    Raises:
        BundleError: If the model reads texts.
    """
    config: dict[str, Any] = json.loads((bundle / "config.json").read_text())
    if "context" not in config["inputs"]:
        raise BundleError(
            f"{bundle}: its model reads texts, not embeddings; MODEL_CARD.md shows how to ask it"
        )
    return config


def torch_runtime(bundle: Path) -> ModuleType:
    """The bundle's own PyTorch module, from the very bytes that were checked."""
    manifest, path = verify(bundle), bundle / "torch_runtime.py"
    source = path.read_bytes()
    if hashlib.sha256(source).hexdigest() != manifest["files"][path.name]["sha256"]:
        raise BundleError(f"{path}: missing or damaged")
    sys.modules["torch_runtime"] = module = ModuleType("torch_runtime")
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


def read_safetensors(path: Path) -> dict[str, Any]:
    """The arrays of a safetensors file; the package `safetensors` does the same."""
    import numpy as np

    types = {"F32": np.float32, "F16": np.float16, "I32": np.int32, "BOOL": np.bool_, "U8": np.uint8}
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    arrays = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            part = data[start + first : start + last]
            arrays[name] = np.frombuffer(part, types[entry["dtype"]]).reshape(entry["shape"])
    return arrays


def checked(embeddings: Any) -> Any:
    """The predictions `[B, E]` themselves, if they are such.

    Raises:
        BundleError: If one is not finite or not of unit norm; its input was no embedding then, such as zeros,
            bytes in another order, or vectors of another type.
    """
    import numpy as np

    norms = np.linalg.norm(embeddings.astype(np.float64), axis=1)
    wrong = np.flatnonzero(~(np.abs(norms - 1) <= 1e-2))  # NaN is wrong too
    if wrong.size:
        raise BundleError(
            f"prediction {wrong[0]} has norm {norms[wrong[0]]:.3g} instead of 1; are the turns and "
            "the query of its request embeddings of the encoder that config.json names?"
        )
    return embeddings


def file_sha256(file: Path) -> str:
    """SHA-256 of a file, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

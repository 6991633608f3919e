"""What may lie in the folder of a bundle, by everything that checks one: compiled code, links."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prime_jax.errors import CheckpointError
from prime_jax.export import torch_jasper, torch_runtime
from prime_jax.manifest import verify_manifest, write_manifest

SOURCES = {"prime": torch_runtime, "jasper": torch_jasper}
CONSUMERS = Path(__file__).parents[2] / "export"


def loaded(path: Path) -> Any:
    """A module from its file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where dataclasses look it up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[path.stem]
    return module


CHECKS: dict[str, Callable[[Path], Any]] = {
    "library": lambda bundle: verify_manifest(bundle, "bundle"),
    "torch_runtime": torch_runtime.verify,
    "torch_jasper": torch_jasper.verify,
    "bundle_files": loaded(CONSUMERS / "bundle_files.py").verify,
}


@pytest.fixture(params=SOURCES)
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with the files of a bundle, which only the runtime needs to be one of."""
    (folder := tmp_path / "bundle").mkdir()
    for name in ("config.json", "model.safetensors", "model.onnx", "golden.safetensors"):
        (folder / name).write_text(name)
    (folder / "encoder").mkdir()
    (folder / "encoder" / "vocab.txt").write_text("[PAD]")
    source = Path(SOURCES[request.param].__file__).read_bytes()
    (folder / "torch_runtime.py").write_bytes(source)
    write_manifest(folder, "bundle", onnx={"fp32": "model.onnx"})
    return folder


def test_its_own_runtime_may_be_imported_where_it_lies(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves alone what Python compiles of it, in any process; nobody else takes that for a bundle's."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    runtime = loaded(bundle / "torch_runtime.py")
    (compiled,) = (bundle / "__pycache__").iterdir()
    half = compiled.with_name(f"{compiled.name}.140234")  # as another process writes it
    half.write_bytes(b"")
    assert runtime.verify(bundle)["onnx"] == {"fp32": "model.onnx"}
    assert sorted((bundle / "__pycache__").iterdir()) == [compiled, half]
    half.unlink()
    for check in CHECKS.values():
        with pytest.raises(Exception, match=r"torch_runtime\..*pyc: not listed.*delete it.*python -B"):
            check(bundle)
    compiled.rename(compiled.with_name("json.cpython-311.pyc"))
    with pytest.raises(runtime.CheckpointError, match=r"json\..*pyc: not listed"):
        runtime.verify(bundle)


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("tokenizer", "../elsewhere"),  # a folder's files are not looked at through its link
        ("encoder/x", "../../elsewhere"),
        ("extra", "encoder"),
        ("copy.json", "config.json"),
        ("nowhere", "/nonexistent"),
        ("model.sig", "../elsewhere/vocab.txt"),
    ],
)
def test_links_are_refused(bundle: Path, name: str, link: str, target: str) -> None:
    (elsewhere := bundle.parent / "elsewhere").mkdir()
    (elsewhere / "vocab.txt").write_text("stranger")
    (bundle / link).symlink_to(target)
    with pytest.raises(Exception, match=rf"{link}: a link; ") as refused:
        CHECKS[name](bundle)
    assert type(refused.value).__name__ in ("CheckpointError", "BundleError")


@pytest.mark.parametrize("name", CHECKS)
def test_listed_files_are_no_links_either_but_the_folder_may_be_one(bundle: Path, name: str) -> None:
    (bundle.parent / "latest").symlink_to(bundle, target_is_directory=True)
    assert CHECKS[name](bundle.parent / "latest")["kind"] == "bundle"
    (bundle / "encoder").rename(bundle.parent / "encoder")
    (bundle / "encoder").symlink_to(bundle.parent / "encoder", target_is_directory=True)
    with pytest.raises(Exception, match="encoder: a link; "):
        CHECKS[name](bundle)


def test_no_manifest_is_written_over_a_link(bundle: Path) -> None:
    (bundle / "latest").symlink_to("encoder", target_is_directory=True)
    with pytest.raises(CheckpointError, match="latest: a link; "):
        write_manifest(bundle, "bundle")

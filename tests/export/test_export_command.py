"""`python -m prime_jax.export`, and the consumer scripts that use nothing but its result."""

import shutil
from pathlib import Path

import pytest
from consumers import consume
from predictors import make

from prime_jax.export.__main__ import main
from prime_jax.export.bundle import write_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "bundle"
    write_bundle(make(residual="query", use_torch_compile=False), folder, facts={"step": 7})
    return folder


def test_exports_again_what_it_loads(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bundle is one of the things that can be loaded, so exporting it must give the same bundle."""
    assert main(["--run", str(bundle), "--out", str(tmp_path / "again")]) == 0
    for file in bundle.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 + 2
    assert lines[4].split() == ["model.onnx", f"{(bundle / 'model.onnx').stat().st_size:,}", "bytes"]
    assert lines[-1].startswith("torch ")
    assert "differs from JAX by" in lines[-1]


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run", str(tmp_path / "nowhere"), "--out", str(tmp_path / "bundle")]) == 2
    text, errors = capsys.readouterr()
    assert text == ""
    assert errors == f"prime-jax export: {tmp_path / 'nowhere'}: there is no such folder\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["predict_onnx.py", "load_torch.py"])
def test_consumers_run_without_jax_and_notice_damage(bundle: Path, tmp_path: Path, script: str) -> None:
    copied = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    done = consume(script, str(copied))
    assert done.returncode == 0, done.stderr
    assert "golden requests: 5, largest difference" in done.stdout
    assert "norm 1.0000" in done.stdout
    assert sorted(file.name for file in copied.iterdir()) == sorted(file.name for file in bundle.iterdir())
    weights = copied / "model.onnx"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    done = consume(script, str(copied))
    assert done.returncode != 0
    assert "model.onnx" in done.stderr

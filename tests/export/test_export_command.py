"""`python -m prime_jax.export`, and the consumer scripts that use nothing but its result."""

import re
import shutil
from pathlib import Path

import pytest
from consumers import consume
from predictors import make

from prime_jax.errors import ExportError
from prime_jax.export.__main__ import main
from prime_jax.export.bundle import write_bundle
from prime_jax.export.triton import write_repository


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
    runtime = copied / "torch_runtime.py"
    source = runtime.read_text()
    runtime.write_text(f"print('it ran')\n{source}")
    done = consume(script, str(copied))
    assert done.returncode == 2
    assert "it ran" not in done.stdout
    assert "torch_runtime.py: missing or damaged" in done.stderr
    runtime.write_text(source)
    (copied / "added.py").write_text("")
    assert "added.py: not listed in manifest.json" in consume(script, str(copied)).stderr
    (copied / "added.py").unlink()
    assert consume(script, str(tmp_path / "nowhere")).returncode == 2
    weights = copied / "model.onnx"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    done = consume(script, str(copied))
    assert done.returncode != 0
    assert "model.onnx" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-loss", "nan"], "--max-loss must be a number"),
        (["--like", "x"], "--like goes with --torch"),
        (["--opset", "5"], "opset 5 is not supported"),
        (["--model-version", "one"], "not a semantic version"),
        (["--precision", "int4"], "unknown precision 'int4'"),
        (["--triton", "{out}/models"], "lies in the bundle"),
        (["--triton", "{bundle}/config.json"], "is a file"),
        (["--data", "{out}"], "does not say which encoder it was trained with|is missing"),
    ],
)
def test_what_contradicts_itself_is_refused_before_anything_is_written(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    out = tmp_path / "out"
    words = [word.format(out=out, bundle=bundle) for word in words]
    assert main(["--run", str(bundle), "--out", str(out), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert list(tmp_path.iterdir()) == []


def test_weights_alone_cannot_be_judged(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--torch",
        str(bundle / "model.safetensors"),
        "--like",
        str(bundle),
        "--out",
        str(tmp_path / "b"),
    ]
    assert main([*words, "--precision", "int8"]) == 2
    assert "weights alone cannot be judged" in capsys.readouterr().err


def test_triton_models_of_another_hand_stay(bundle: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    assert write_repository(bundle, models) == ["prime_predictor"]
    assert write_repository(bundle, models) == ["prime_predictor"]
    (models / "prime_predictor" / "7").mkdir()
    with pytest.raises(ExportError, match="holds something else than this command writes"):
        write_repository(bundle, models)
    assert sorted(entry.name for entry in (models / "prime_predictor").iterdir()) == [
        "1",
        "7",
        "config.pbtxt",
    ]

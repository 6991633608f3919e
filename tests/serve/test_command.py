"""`python -m prime_jax.serve` as an operator runs it."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from predictors import D, make

import prime_jax
from prime_jax.errors import ConfigError
from prime_jax.export.bundle import write_bundle
from prime_jax.serve.__main__ import main
from prime_jax.serve.settings import read_settings


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "bundle"
    write_bundle(make(), folder, facts={"step": 7})
    return folder


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_it_is_told_to_stop(bundle: Path, stop: signal.Signals) -> None:
    command = [sys.executable, "-m", "prime_jax.serve", "--run", str(bundle), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("Loading")
        address = process.stderr.readline().split()[2]
        assert httpx.get(f"{address}/health").json()["step"] == 7
        turns, query = np.ones((1, D)), np.linspace(-1, 1, D)
        request = {"context_embeddings": turns.tolist(), "query_embedding": query.tolist()}
        answer = httpx.post(f"{address}/predict", json=request).json()["predicted_embedding"]
        expected = prime_jax.load(bundle).predict(turns, query)
        np.testing.assert_allclose(answer, expected, atol=1e-5)
        process.send_signal(stop)
        assert process.wait(30) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()


def test_it_serves_what_needs_no_training() -> None:
    command = [sys.executable, "-m", "prime_jax.serve", "--untrained", "3", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        address = process.stderr.readline().split()[2]
        request = {"context_embeddings": [[0, 2, 0], [0, 0, 1]], "query_embedding": [5, 0, 0]}
        answer = httpx.post(f"{address}/predict", json=request).json()["predicted_embedding"]
        expected = np.array([1, 0.15, 0.3])
        np.testing.assert_allclose(answer, expected / np.linalg.norm(expected), atol=1e-6)
    finally:
        process.kill()


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"prime-jax serve: {tmp_path / 'nowhere'}: there is no such folder"
    )
    assert main(["--run", "x", "--port", "99999"]) == 2
    assert "prime-jax serve: --port: Input should be less than or equal to 65535" in capsys.readouterr().err
    for words in ([], ["--run", "x", "--untrained", "8"], ["--run", "x", "--general"]):
        assert main(words) == 2
        assert "prime-jax serve: name one: a --run, --untrained with the" in capsys.readouterr().err
    for more, message in (
        (["--untrained", "8", "--encoder", "minilm"], "--encoder goes with --run"),
        (["--untrained", "8", "--precision", "bfloat16"], "--precision goes with --run"),
        (["--run", "x", "--max-turns", "3"], "--max-turns goes with --untrained"),
    ):
        assert main(more) == 2
        assert message in capsys.readouterr().err


def test_a_port_that_is_taken(bundle: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "prime_jax.serve", "--run", str(bundle), "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == f"prime-jax serve: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_settings_come_from_options_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIME_SERVE_RUN", "from-environment")
    monkeypatch.setenv("PRIME_SERVE_MAX_DELAY_MS", "7.5")
    settings = read_settings(["--port", "81", "--max-delay-ms", "3"])
    assert (settings.run, settings.port, settings.max_delay_ms) == (Path("from-environment"), 81, 3.0)
    with pytest.raises(ConfigError, match="--prot"):
        read_settings(["--prot", "81"])


def test_help_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert 15 < len(lines) <= 50
    assert any("--max-sessions" in line for line in lines)

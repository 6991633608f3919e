"""The console script hands the words after a command to the right module and says what it does not know."""

import subprocess
import sys
import types

import pytest

from prime_jax import cli
from prime_jax._version import __version__

MODULES = {
    "pydocs": "prime_jax.data.pydocs",
    "combine": "prime_jax.data.combine",
    "encode": "prime_jax.data.encode",
    "steering": "prime_jax.data.steering",
    "train": "prime_jax.train.__main__",
    "sweep": "prime_jax.train.sweep",
    "evaluate": "prime_jax.evaluate.__main__",
    "explain": "prime_jax.explain.__main__",
    "tune": "prime_jax.export.tune",
    "serve": "prime_jax.serve.__main__",
    "export": "prime_jax.export.__main__",
    "inspect": "prime_jax.export.inspection",
    "verify": "prime_jax.export.verification",
}


class _Module(types.ModuleType):
    """Stands where a command looks for its module; keeps the words it was given."""

    def __init__(self, name: str, exit_code: int | None) -> None:
        super().__init__(name)
        self.seen: list[list[str]] = []
        self.exit_code = exit_code

    def main(self, argv: list[str]) -> int:
        self.seen.append(argv)
        if self.exit_code is None:
            raise KeyboardInterrupt
        return self.exit_code


def _stand_in(monkeypatch: pytest.MonkeyPatch, module: str, exit_code: int | None) -> list[list[str]]:
    """Put a stand-in for `module`; exit code None means that Ctrl-C stops it."""
    stub = _Module(module, exit_code)
    monkeypatch.setitem(sys.modules, module, stub)
    return stub.seen


@pytest.mark.parametrize(("command", "module"), MODULES.items())
def test_command_hands_over_arguments_and_exit_code(
    command: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = _stand_in(monkeypatch, module, exit_code=7)
    assert cli.main([command, "--out", "a b", "--help"]) == 7
    assert seen == [["--out", "a b", "--help"]]


@pytest.mark.parametrize("command", ["encode", "pydocs"])
def test_data_commands_have_a_two_word_form(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _stand_in(monkeypatch, MODULES[command], exit_code=0)
    assert cli.main(["data", command, "--data", "x"]) == 0
    assert seen == [["--data", "x"]]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["trian"], "prime-jax: unknown command 'trian'; did you mean 'train'?"),
        (["evalute", "--run", "x"], "prime-jax: unknown command 'evalute'; did you mean 'evaluate'?"),
        (
            ["xyz"],
            "prime-jax: unknown command 'xyz'; choose from pydocs, combine, encode, steering, "
            "train, sweep, evaluate, explain, tune, serve, export, inspect, verify",
        ),
        (["data", "encod"], "prime-jax: unknown command 'encod'; did you mean 'encode'?"),
        (["data", "xyz"], "prime-jax: unknown command 'xyz'; choose from pydocs, combine, encode, steering"),
    ],
)
def test_unknown_command_names_the_nearest(
    argv: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    assert capsys.readouterr() == ("", line + "\n")


def test_help_fits_a_screen_and_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text, errors = capsys.readouterr()
    lines = text.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(MODULES)
    assert errors == ""


@pytest.mark.parametrize("argv", [[], ["data"]])
def test_no_command_is_a_mistake(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    text, errors = capsys.readouterr()
    assert text == ""
    assert errors.startswith("usage: prime-jax COMMAND")


def test_ctrl_c_ends_with_130_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _stand_in(monkeypatch, MODULES["train"], exit_code=None)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr() == ("", "prime-jax train: stopped by Ctrl-C\n")


def test_version_comes_without_loading_jax() -> None:
    code = (
        "import sys; from prime_jax.cli import main; code = main(['--version']); "
        "sys.exit('jax was loaded' if 'jax' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"prime-jax {__version__}\n", "")

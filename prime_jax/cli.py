"""The console script `prime-jax`: one word per thing to do, handed to the module that does it.

`prime-jax train ...` is `python -m prime_jax.train ...`, and so on. A module loads when its command runs.
"""

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

from prime_jax._version import __version__

_COMMANDS = {
    "pydocs": (
        "prime_jax.data.pydocs",
        "make a corpus of the documentation installed on this machine",
    ),
    "combine": ("prime_jax.data.combine", "make one data folder of several, to train on all of them"),
    "encode": ("prime_jax.data.encode", "encode the texts of a data folder into its embedding store"),
    "steering": ("prime_jax.data.steering", "make clusters, steering and hard negatives for JASPER"),
    "train": ("prime_jax.train.__main__", "train a predictor from a YAML config"),
    "sweep": ("prime_jax.train.sweep", "try settings, several seeds each, and keep the best"),
    "evaluate": ("prime_jax.evaluate.__main__", "compare searching with the prediction against baselines"),
    "explain": ("prime_jax.explain.__main__", "say why a steered model predicts what it predicts"),
    "tune": ("prime_jax.export.tune", "compare what needs no training, and write the best as a bundle"),
    "serve": ("prime_jax.serve.__main__", "answer predictions over HTTP"),
    "export": ("prime_jax.export.__main__", "write a bundle for ONNX Runtime and PyTorch"),
    "inspect": ("prime_jax.export.inspection", "show what is inside a run, a checkpoint or a bundle"),
    "verify": ("prime_jax.export.verification", "check every file, the signature and the golden answers"),
}
_DATA_COMMANDS = ("pydocs", "combine", "encode", "steering")  # also reached as `prime-jax data encode`


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after `prime-jax`; those of the process when None.

    Returns:
        The exit code of the command; 2 when there is no such command, 130 when Ctrl-C stopped it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    known: Sequence[str] = tuple(_COMMANDS)
    if words[:1] == ["data"]:
        words, known = words[1:], _DATA_COMMANDS
    if not words:
        print(_usage(), file=sys.stderr)
        return 2
    name, *rest = words
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        print(f"prime-jax {__version__}")
        return 0
    if name not in known:
        return _unknown(name, known)
    try:
        return int(import_module(_COMMANDS[name][0]).main(rest))
    except KeyboardInterrupt:
        print(f"prime-jax {name}: stopped by Ctrl-C", file=sys.stderr)
        return 130


def _unknown(name: str, known: Sequence[str]) -> int:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean '{nearest[0]}'?" if nearest else f"choose from {', '.join(known)}"
    print(f"prime-jax: unknown command '{name}'; {hint}", file=sys.stderr)
    return 2


def _usage() -> str:
    lines = [f"  {name:<10}{what}" for name, (_, what) in _COMMANDS.items()]
    return "\n".join(
        [
            "usage: prime-jax COMMAND [OPTIONS]",
            "",
            "Predict the embedding of what to retrieve, before searching.",
            "",
            *lines,
            "",
            "prime-jax COMMAND --help lists the options of a command; prime-jax --version names the version.",
        ]
    )

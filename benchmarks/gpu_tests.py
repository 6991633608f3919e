"""Runs the tests marked gpu and writes what came of each, and how long it took.

    python -m benchmarks.gpu_tests --out FILE.json [--tiny]

`--tiny` runs them on a CPU, where they are skipped otherwise: a dry run, of one of the three kinds of context
attention only. The exit code is pytest's.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from prime_jax.files import write_json

ROOT = Path(__file__).parents[1]
ON_CPU = "PRIME_JAX_GPU_TESTS"
MOST_AT_ONCE = 4


class Record:
    """A pytest plugin: writes the file anew after every test."""

    def __init__(self, file: Path):
        self._file = file
        self._began = time.monotonic()
        self._tests: dict[str, Any] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """One phase of one test: set-up, the test itself, or tear-down."""
        name = report.nodeid.rpartition("::")[2]
        test = self._tests.setdefault(name, {"outcome": "not ended", "seconds": 0.0})
        test["seconds"] = round(test["seconds"] + report.duration, 2)
        if report.when == "call" and report.outcome == "passed":
            test["outcome"] = "passed"
        if report.outcome != "passed":
            test["outcome"] = report.outcome
            test["why"] = str(report.longrepr).strip().splitlines()[-1][:300] if report.longrepr else ""
        outcomes = [test["outcome"] for test in self._tests.values()]
        counts = {kind: outcomes.count(kind) for kind in ("passed", "failed", "skipped", "not ended")}
        seconds = round(time.monotonic() - self._began, 1)
        write_json(
            self._file,
            {"headline": {**counts, "seconds": seconds}, **counts, "seconds": seconds, "tests": self._tests},
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--tiny", action="store_true", help="on a CPU: a dry run")
    given = parser.parse_args(argv)
    if given.tiny:
        os.environ[ON_CPU] = "cpu"
    few = ["-k", "not full and not prefix"] if given.tiny else []
    flags = os.environ.get("XLA_FLAGS", "")
    if not given.tiny:  # kernels by rule, not by timing: what is tested here is what they compute
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()
    at_once = min(MOST_AT_ONCE, (os.cpu_count() or 1) // 4)
    if at_once > 1 and find_spec("xdist") is not None:  # most of the time goes to compiling
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        few += ["-n", str(at_once)]
    options = ["-m", "gpu", *few, "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    return int(pytest.main([*options, str(ROOT / "tests" / "test_gpu.py")], plugins=[Record(given.out)]))


if __name__ == "__main__":
    sys.exit(main())

"""Running the consumer scripts as their users do: by an interpreter without JAX.

`make consumers` names the interpreter of a clean environment; otherwise our own runs them with JAX shut out.
"""

import os
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "export"
PYTHON = os.environ.get("PRIME_CONSUMER_PYTHON", sys.executable)
CODE = (
    "import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rpartition('/')[0])\n"
    "for name in ('jax', 'flax', 'prime_jax', 'safetensors'): sys.modules[name] = None\n"
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


def consume(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `export/<script>` with these arguments."""
    command = [PYTHON, "-c", CODE, str(SCRIPTS / script), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)

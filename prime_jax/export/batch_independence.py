"""Whether an ONNX file answers a request alike alone and in company, and an empty batch at all.

Servers join the requests of many callers into one batch, so no row may change another one's answer.
"""

from pathlib import Path
from typing import Any

import numpy as np

from prime_jax.errors import ExportError
from prime_jax.export.golden import TOLERANCE, open_session
from prime_jax.export.interface import Arrays, Interface

MANY = 64  # rows of the larger batch
ALLOWED = (
    1e-2  # in lower precisions, where one rounding of an activation may tip over; shared scales give 0.1
)


def batch_independence(
    interface: Interface, golden: Arrays, bundle: Path, files: dict[str, str]
) -> dict[str, Any]:
    """Compare golden requests alone with the same in company of a row unlike them, and of 64 rows.

    Args:
        interface: How the model is called.
        golden: Inputs and answers.
        bundle: Folder of the ONNX files.
        files: Their names by precision.

    Returns:
        `rows`, the figures of `Interface.stranger` and, by precision, `max_abs_difference` of an answer alone
        and in company.

    Raises:
        ExportError: If a file's answers depend on their company, or an empty batch gives no answer `(0, E)`.
    """
    found = {precision: _difference(interface, golden, bundle / name) for precision, name in files.items()}
    for precision, difference in found.items():
        allowed = TOLERANCE if precision == "fp32" else ALLOWED
        if not difference <= allowed:
            raise ExportError(
                f"{files[precision]}: an answer in company differs by {difference:.2g} from the same alone, "
                f"allowed is {allowed:g}; nothing was written"
            )
    return {"rows": MANY, **interface.stranger[1], "max_abs_difference": found}


def _difference(interface: Interface, golden: Arrays, path: Path) -> float:
    session = open_session(path)
    inputs = {name: golden[name] for name in interface.names}

    def run(feeds: Arrays) -> np.ndarray[Any, np.dtype[np.float32]]:
        return np.asarray(session.run(["embedding"], feeds)[0])

    rows = len(golden["embedding"])
    alone = np.concatenate([run(feeds) for feeds in interface.alone(golden)])
    strange = interface.beside_a_stranger(golden)
    many = np.arange(max(MANY, rows)) % rows
    found = max(
        float(np.abs(run(strange.inputs)[strange.rows] - alone).max()),
        float(np.abs(run({name: array[many] for name, array in inputs.items()}) - alone[many]).max()),
    )
    empty = run({name: array[:0] for name, array in inputs.items()})
    if empty.shape != (0, alone.shape[1]):
        raise ExportError(f"{path.name}: an empty batch gives {empty.shape}; nothing was written")
    return found

"""Whether an ONNX file answers a request alike alone and in company, and an empty batch at all.

Servers join the requests of many callers into one batch, so no row may change another one's answer.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from prime_jax.errors import ExportError
from prime_jax.export.golden import TOLERANCE, min_cosine, open_session
from prime_jax.export.interface import Arrays, Interface

Answers = np.ndarray[Any, np.dtype[np.float32]]
MANY = 64  # rows of the larger batch
ALLOWED = (
    1e-2  # in lower precisions, where one rounding of an activation may tip over; shared scales give 0.1
)
LEAST_COSINE = 0.99  # in lower precisions, of an answer without padding to that with it: many may tip over


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
        and in company; where the length of requests is free also `padding`, by precision, with
        `max_abs_difference` and `min_cosine` of an answer with padding and without.

    Raises:
        ExportError: If a file's answers depend on their company or on padding, or an empty batch gives no
            answer `(0, E)`.
    """
    found: dict[str, Any] = {"rows": MANY, **interface.stranger[1], "max_abs_difference": {}, "padding": {}}
    for precision, name in files.items():
        run, exact = _runner(bundle / name), precision == "fp32"
        alone = np.concatenate([run(feeds) for feeds in interface.alone(golden)])
        difference = _in_company(interface, golden, run, alone)
        allowed = TOLERANCE if exact else ALLOWED
        if not difference <= allowed:
            raise ExportError(
                f"{name}: an answer in company differs by {difference:.2g} from the same alone, "
                f"allowed is {allowed:g}; nothing was written"
            )
        found["max_abs_difference"][precision] = difference
        empty = run({given: golden[given][:0] for given in interface.names})
        if empty.shape != (0, alone.shape[1]):
            raise ExportError(f"{name}: an empty batch gives {empty.shape}; nothing was written")
        if bare := [run(feeds) for feeds in interface.without_padding(golden)]:
            found["padding"][precision] = _of_padding(name, np.concatenate(bare), alone, exact)
    if not found["padding"]:
        del found["padding"]
    return found


def _runner(path: Path) -> Callable[[Arrays], Answers]:
    session = open_session(path)
    return lambda feeds: np.asarray(session.run(["embedding"], feeds)[0])


def _in_company(
    interface: Interface, golden: Arrays, run: Callable[[Arrays], Answers], alone: Answers
) -> float:
    strange, rows = interface.beside_a_stranger(golden), len(alone)
    many = np.arange(max(MANY, rows)) % rows
    return max(
        float(np.abs(run(strange.inputs)[strange.rows] - alone).max()),
        float(np.abs(run({name: golden[name][many] for name in interface.names}) - alone[many]).max()),
    )


def _of_padding(name: str, bare: Answers, padded: Answers, exact: bool) -> dict[str, float]:
    """How far answers without padding are from those with it; it changes in which order numbers are added."""
    difference, cosine = float(np.abs(bare - padded).max()), min_cosine(bare, padded)
    if not (difference <= TOLERANCE if exact else cosine >= LEAST_COSINE):
        raise ExportError(
            f"{name}: padding changes an answer by {difference:.2g} (cosine {cosine:.6f}); "
            "nothing was written"
        )
    return {"max_abs_difference": difference, "min_cosine": cosine}

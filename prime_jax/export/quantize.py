"""Smaller ONNX files from the float32 one: half precision and 8-bit integers.

`fp16` halves the file and is meant for GPUs; inputs and outputs stay float32. `int8` keeps the weights of
every affine map as int8 with one scale per output, and quantises activations as they come, each row by a
scale of its own; it is meant for CPUs.
"""

import tempfile
from pathlib import Path
from typing import Any, Literal, get_args

from prime_jax.errors import ExportError
from prime_jax.export.optional import need

Precision = Literal["fp32", "fp16", "int8"]
SCALES = "activation_scales"  # in the metadata of an int8 file; those without it share scales in a batch
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def file_of(precision: Precision) -> str:
    """Name of a bundle's ONNX file of a precision."""
    return "model.onnx" if precision == "fp32" else f"model.{precision}.onnx"


def parse_precisions(text: str) -> tuple[Precision, ...]:
    """Precisions from words such as `fp32,int8`; fp32 comes first and always, the others are judged by it.

    Raises:
        ExportError: For a word that is none.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in PRECISIONS:
            raise ExportError(f"unknown precision {word!r}; choose from {', '.join(PRECISIONS)}")
    return tuple(name for name in PRECISIONS if name == "fp32" or name in words)


def quantize(model: Path, out: Path, precision: Precision) -> None:
    """Write `model`, a float32 ONNX file, to `out` in a lower precision.

    Args:
        model: The float32 file; weights in a second file are read along.
        out: Where to write; weights beyond 2 GB go to `out` + ".data".
        precision: `fp16` or `int8`.

    Raises:
        ExportError: If onnxruntime or onnx is missing, or their tools fail.
    """
    from prime_jax.export.to_onnx import LARGEST

    ir, onnx = need("onnx_ir", "onnx"), need("onnx", "onnx")
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        (ready := Path(folder) / "ready").mkdir()
        try:
            smaller = _to_half(model) if precision == "fp16" else _to_integers(model)
            smaller.metadata_props["precision"] = precision
            if precision == "int8":
                smaller.metadata_props[SCALES] = "rows"
            size = sum(value.const_value.nbytes for value in smaller.graph.initializers.values())
            ir.save(smaller, ready / out.name, external_data=f"{out.name}.data" if size > LARGEST else None)
            onnx.checker.check_model(str(ready / out.name))
        except ExportError:
            raise
        except Exception as failed:  # the tools raise many kinds
            raise ExportError(f"{out}: could not make {precision} of it: {failed}") from failed
        for file in sorted(ready.iterdir(), reverse=True):  # the weights first
            file.replace(out.with_name(file.name))


def _to_half(model: Path) -> Any:
    ir, onnx = need("onnx_ir", "onnx"), need("onnx", "onnx")
    tools = need("onnxruntime.transformers.float16", "onnx")
    half = ir.from_proto(tools.convert_float_to_float16(onnx.load(str(model)), keep_io_types=True))
    half.graph.sort()  # the tool appends the casts of inputs behind their readers
    return half


def _to_integers(model: Path) -> Any:
    from prime_jax.export.integers import to_integers

    ir = need("onnx_ir", "onnx")
    whole = ir.external_data.load_to_model(ir.load(model))
    to_integers(whole)
    return whole

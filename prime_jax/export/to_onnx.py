"""The predictor as an ONNX file: any batch, inputs and outputs as its `Interface` names them.

Of embeddings: `context`, `context_mask`, `query`. The number of turns is fixed at max_context_length;
`context_mask` says which of them are real. A steered model has one, its steering vector; with subspaces it
also gives `routing`, `coarse` and `fine`. Of texts: `input_ids` and `attention_mask`, of any length.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from prime_jax._version import __version__
from prime_jax.errors import ExportError
from prime_jax.export.interfaces import interface_of
from prime_jax.export.onnx_graph import tidy
from prime_jax.export.optional import need
from prime_jax.models import Model

OPSET = 20  # the first with Gelu; ONNX Runtime reads it since 1.17
OPSETS = range(17, 24)  # 17 is the first with LayerNormalization
LARGEST = 2**31 - 2**24  # bytes of weights; protobuf ends at 2 GiB, larger models keep them in a second file


def to_onnx(
    model: Model, path: Path, *, opset: int = OPSET, facts: Mapping[str, object] | None = None
) -> None:
    """Write `model` to `path`, and to `path` + ".data" where its weights are too large for one file.

    Args:
        model: A model whose compute dtype is float32.
        path: The file to write; it appears only when it is complete and onnx's checker accepts it.
        opset: Version of ONNX's operators, 17 to 23; below 20 GELU is written out by Erf.
        facts: Further entries of the file's metadata, such as `model_version`.

    Raises:
        ExportError: If jax2onnx, onnx or onnx_ir is missing, the opset is none of these, the result is not
            valid ONNX, or all centroids of the model are zero.
    """
    interface_of(model.config).check(model)
    if opset not in OPSETS:
        raise ExportError(f"opset {opset} is not supported; choose {OPSETS[0]} to {OPSETS[-1]}")
    need("onnx_ir", "onnx")
    graph = _traced(model, opset)
    tidy(graph)
    _describe(graph, model, facts or {})
    save_graph(graph, path)


def save_graph(graph: Any, path: Path) -> None:
    """Write an `onnx_ir.Model` to `path`, complete and accepted by onnx's checker; large weights beside it.

    Raises:
        ExportError: If it is not valid ONNX, or a package is missing.
    """
    ir, onnx = need("onnx_ir", "onnx"), need("onnx", "onnx")
    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        written = Path(folder) / path.name
        ir.save(graph, written, external_data=f"{path.name}.data" if size > LARGEST else None)
        try:
            onnx.checker.check_model(str(written), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as invalid:
            raise ExportError(f"{path}: jax2onnx wrote a graph that is not valid ONNX: {invalid}") from None
        for part in sorted(Path(folder).iterdir(), reverse=True):  # the weights first
            part.replace(path.with_name(part.name))


def _traced(model: Model, opset: int) -> Any:
    """What jax2onnx makes of the model, as an `onnx_ir.Model`."""
    jax2onnx = need("jax2onnx", "onnx")
    interface = interface_of(model.config)
    letters = {size for given in interface.inputs for size in given.sizes if isinstance(size, str)}
    names = ["B", *sorted(letters)]
    free: dict[int | str, Any] = dict(zip(names, jax.export.symbolic_shape(", ".join(names)), strict=True))
    shapes = [
        jax.ShapeDtypeStruct((free["B"], *(free.get(size, size) for size in given.sizes)), given.dtype)
        for given in interface.inputs
    ]
    outputs = [output.name for output in interface.outputs]

    def predict(*given: jax.Array) -> Any:
        found = interface.predict(model, dict(zip(interface.names, given, strict=True)))
        answers = tuple(found[name] for name in outputs)
        return answers if len(answers) > 1 else answers[0]

    return jax2onnx.to_onnx(
        predict,
        inputs=shapes,
        model_name="prime_predictor",
        opset=opset,
        return_mode="ir",
        input_names=interface.names,
        output_names=outputs,
        normalization_mode="prefer_native",
    )


def _describe(graph: Any, model: Model, more: Mapping[str, object]) -> None:
    """Say in the file itself what it is and what its inputs mean."""
    interface = interface_of(model.config)
    facts = {"prime_jax": __version__, **interface.metadata(), "precision": "fp32", **more}
    graph.metadata_props.update({name: str(fact) for name, fact in facts.items()})
    given = interface.words({}).given
    graph.doc_string = f"Predicts the embedding of the passage to retrieve from {given}."
    meanings = {tensor.name: tensor.meaning for tensor in (*interface.inputs, *interface.outputs)}
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        value.doc_string = meanings[value.name]

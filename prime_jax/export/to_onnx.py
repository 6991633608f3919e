"""The predictor as an ONNX file: inputs `context`, `context_mask`, `query`, output `embedding`, any batch.

The number of turns is fixed at max_context_length; `context_mask` says which of them are real. A steered
model has one, its steering vector; with subspaces it also gives `routing`, `coarse` and `fine`.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from prime_jax._version import __version__
from prime_jax.errors import ExportError
from prime_jax.export.interface import INPUTS, check_centroids, inputs_of, outputs_of
from prime_jax.export.onnx_graph import tidy
from prime_jax.export.optional import need
from prime_jax.models import Model
from prime_jax.models.prime import EmbeddingPredictor, PredictorConfig
from prime_jax.models.subspace import SubspaceConfig

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
    check_centroids(model)
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
    (batch,) = jax.export.symbolic_shape("B")
    shapes = model.config.fake_inputs(1)
    inputs = [jax.ShapeDtypeStruct((batch, *shapes[name].shape[1:]), shapes[name].dtype) for name in INPUTS]

    outputs = [output.name for output in outputs_of(model.config)]

    def predict(context: jax.Array, context_mask: jax.Array, query: jax.Array) -> Any:
        if isinstance(model, EmbeddingPredictor):
            return jnp.asarray(model(context, query, context_mask))
        found = model.details(context, query, context_mask)._asdict()
        answers = tuple(jnp.asarray(found[name]) for name in outputs)
        return answers if len(answers) > 1 else answers[0]

    return jax2onnx.to_onnx(
        predict,
        inputs=inputs,
        model_name="prime_predictor",
        opset=opset,
        return_mode="ir",
        input_names=list(INPUTS),
        output_names=outputs,
        normalization_mode="prefer_native",
    )


def _describe(graph: Any, model: Model, more: Mapping[str, object]) -> None:
    """Say in the file itself what it is and what its inputs mean."""
    config = model.config
    facts: dict[str, object] = {
        "prime_jax": __version__,
        "input_dim": config.input_dim,
        "output_dim": config.output_dim,
        "max_context_length": config.max_context_length,
        "normalised": "true",
        "residual": config.residual,
    }
    if isinstance(config, PredictorConfig):
        facts["context_attention"] = config.context_attention
        given = "past turns and a query"
    else:
        facts["kind"] = config.kind
        given = "a question and a steering vector"
    if isinstance(config, SubspaceConfig):
        facts |= {"num_subspaces": config.num_subspaces, "routing": config.routing}
    facts |= {"precision": "fp32", **more}
    graph.metadata_props.update({name: str(fact) for name, fact in facts.items()})
    graph.doc_string = f"Predicts the embedding of the passage to retrieve from {given}."
    meanings = {tensor.name: tensor.meaning for tensor in (*inputs_of(config), *outputs_of(config))}
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        value.doc_string = meanings[value.name]

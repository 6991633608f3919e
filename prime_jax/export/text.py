"""Encoders that were trained with a predictor, in its bundle: folders, ONNX files, and the whole as one.

`encoder/x` and `encoder/y` are sentence encoders' folders with the tokenizer and a `model.onnx` each;
`text.onnx` takes the token ids of turns and query and gives the vector to search with.
"""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from prime_jax.errors import ExportError
from prime_jax.export.einsums import replace_einsums
from prime_jax.export.golden import TOLERANCE, min_cosine
from prime_jax.export.interface import Arrays
from prime_jax.export.optional import need
from prime_jax.export.to_onnx import OPSET, save_graph
from prime_jax.models.prime import EmbeddingPredictor
from prime_jax.nn.bert import Pooling, pool
from prime_jax.nn.encoders import EncoderModel
from prime_jax.pretrained.bert import BertTextEncoder
from prime_jax.pretrained.pair import FOLDER, load_pair

TEXT = "text.onnx"
GOLDEN = "golden_text.safetensors"
INPUTS = ("input_ids", "attention_mask")
LONGEST = 24  # tokens of a golden text


def write_encoders(model: EmbeddingPredictor, source: Path, bundle: Path, opset: int) -> dict[str, Any]:
    """Copy the encoders into a bundle and write their ONNX files, compared with JAX.

    Args:
        model: The predictor, float32.
        source: What `write_pair` wrote.
        bundle: Where to write.
        opset: Version of ONNX's operators.

    Returns:
        For each file the largest difference to JAX on golden texts.

    Raises:
        ExportError: If a file differs from JAX by more than 1e-5, or a package is missing.
        DataError: If the encoders' folder is incomplete or damaged.
    """
    for name in ("x", "y"):
        shutil.copytree(source / name, bundle / FOLDER / name)
    pair, config = load_pair(bundle / FOLDER), model.config
    whole = _golden(pair.x, config.max_context_length)
    x = _model(pair.x)

    def predict(ids: Int[Array, "B texts T"], mask: Int[Array, "B texts T"]) -> Float[Array, "B E"]:
        rows, texts, width = ids.shape
        flat = ids.reshape(rows * texts, width), mask.reshape(rows * texts, width)
        vectors = _embedded(x, *flat, pair.x.pooling).reshape(rows, texts, -1)
        return model(vectors[:, :-1], vectors[:, -1], mask[:, :-1, 0] > 0)

    shape = (config.max_context_length + 1,)
    found = {TEXT: _written(predict, bundle / TEXT, shape, whole, opset)}
    from safetensors.numpy import save_file

    save_file(whole, bundle / GOLDEN)
    (bundle / GOLDEN).chmod(0o644)
    for name, encoder in (("x", pair.x), ("y", pair.y)):
        path = bundle / FOLDER / name / "model.onnx"
        found[f"{FOLDER}/{name}/model.onnx"] = write_encoder_onnx(encoder, path, opset)
    return {"tolerance": TOLERANCE, "max_abs_difference": found}


def write_encoder_onnx(encoder: BertTextEncoder, path: Path, opset: int = OPSET) -> float:
    """Write an encoder as ONNX: `input_ids` and `attention_mask` `[B, T]` to `embedding` `[B, H]`.

    Returns:
        Its largest difference to JAX on golden texts.

    Raises:
        ExportError: If that is above 1e-5, or a package is missing.
    """
    model, pooling = _model(encoder), encoder.pooling

    def embed(ids: Int[Array, "B T"], mask: Int[Array, "B T"]) -> Float[Array, "B H"]:
        return _embedded(model, ids, mask, pooling)

    texts = {name: values[:, -1] for name, values in _golden(encoder, 3).items()}
    return _written(embed, path, (), texts, opset)


def check_text(bundle: Path) -> float | None:
    """Largest difference of `text.onnx` to the golden answers beside it, None where a bundle has none."""
    from prime_jax.models.bundle import read_tensors

    if not (bundle / TEXT).is_file():
        return None
    golden = read_tensors(bundle / GOLDEN)
    return float(np.abs(_answers(bundle / TEXT, golden) - golden["embedding"]).max())


def _written(function: Any, path: Path, middle: tuple[int, ...], golden: Arrays, opset: int) -> float:
    """Write an ONNX file of token ids `[B, *middle, T]` and give its largest difference to JAX."""
    jax2onnx = need("jax2onnx", "onnx")
    batch, tokens = jax.export.symbolic_shape("B, T")
    shape = jax.ShapeDtypeStruct((batch, *middle, tokens), jnp.int32)
    graph = jax2onnx.to_onnx(
        function,
        inputs=[shape, shape],
        model_name="prime_text",
        opset=opset,
        return_mode="ir",
        input_names=list(INPUTS),
        output_names=["embedding"],
        normalization_mode="prefer_native",
    )
    replace_einsums(graph)
    for node in graph.graph:
        for value in node.outputs:
            if value.type is None:  # a shape without a type cannot be written down
                value.shape = None
    save_graph(graph, path)
    with jax.default_matmul_precision("highest"):
        expected = np.asarray(function(*(jnp.asarray(golden[name]) for name in INPUTS)))
    golden["embedding"] = expected
    answers = _answers(path, golden)
    difference = float(np.abs(answers - expected).max())
    if not difference <= TOLERANCE:
        raise ExportError(
            f"{path.name}: differs from JAX by {difference:.2g} on golden texts (cosine "
            f"{min_cosine(answers, expected):.6f}), allowed is {TOLERANCE:g}; nothing was written"
        )
    return difference


def _answers(path: Path, golden: Arrays) -> np.ndarray[Any, np.dtype[Any]]:
    runtime = need("onnxruntime", "onnx")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["embedding"], {name: golden[name] for name in INPUTS})[0])


def _model(encoder: BertTextEncoder) -> EncoderModel:
    model: EncoderModel = nnx.merge(encoder.structure(jnp.float32), encoder.params)
    return model


def _embedded(
    model: EncoderModel, ids: Int[Array, "B T"], mask: Int[Array, "B T"], pooling: Pooling
) -> Float[Array, "B H"]:
    """As the encoder itself, positions counted from the mask: a graph of any length has no other count."""
    at = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    return pool(model(ids, mask > 0, positions=at), mask > 0, pooling)


def _golden(encoder: BertTextEncoder, turns: int) -> Arrays:
    """Seeded token ids `[N + 1, N + 1, T]` and mask: every number of turns from 0 to N, then a query."""
    rng = np.random.default_rng(0)
    rows, width = turns + 1, min(LONGEST, encoder.max_length)
    vocabulary = encoder.params["words"]["embedding"].shape[0]
    lengths = rng.integers(2, width + 1, (rows, rows))
    lengths[:, :-1] *= np.arange(turns) < np.arange(rows)[:, None]
    mask = np.arange(width) < lengths[..., None]
    ids = np.where(mask, rng.integers(0, vocabulary, mask.shape), 0)
    return {"input_ids": ids.astype(np.int32), "attention_mask": mask.astype(np.int32)}

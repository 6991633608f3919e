"""The ONNX file itself: its interface, what it says of itself, plain products, and a second file if large."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from predictors import D, N, answers, make, requests, session

from prime_jax.errors import ExportError
from prime_jax.export import to_onnx as module
from prime_jax.export.to_onnx import to_onnx


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    to_onnx(make(), path)
    return onnx.load(path)


def test_interface(exported: Any) -> None:
    """Names, types and shapes that consumers build on; only the batch is free."""

    def described(value: Any) -> tuple[str, int, list[Any]]:
        tensor = value.type.tensor_type
        return value.name, tensor.elem_type, [d.dim_param or d.dim_value for d in tensor.shape.dim]

    FLOAT, BOOL = onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL
    assert [described(value) for value in exported.graph.input] == [
        ("context", FLOAT, ["B", N, D]),
        ("context_mask", BOOL, ["B", N]),
        ("query", FLOAT, ["B", D]),
    ]
    assert [described(value) for value in exported.graph.output] == [("embedding", FLOAT, ["B", D])]
    assert [(opset.domain, opset.version) for opset in exported.opset_import] == [("", 20)]
    assert all(value.doc_string for value in (*exported.graph.input, *exported.graph.output))
    facts = {entry.key: entry.value for entry in exported.metadata_props}
    assert facts["max_context_length"] == str(N)
    assert facts["normalised"] == "true"


LAYER = {
    **{"LayerNormalization": 2, "MatMul": 6, "Transpose": 4, "Softmax": 1, "Gelu": 1},
    **{"Add": 6, "Div": 1, "Where": 1, "Split": 1, "Reshape": 4},
}


def test_a_layer_adds_its_own_operators_and_no_shape_arithmetic(tmp_path: Path) -> None:
    """Four products with their biases, two sums, scaled and masked attention, and heads taken apart.

    Attention is two products, with heads in front of tokens. No Einsum: an empty batch ends it.

    The batch is asked for once in the whole graph.
    """
    counts = []
    for layers in (2, 3, 5):
        to_onnx(make(num_layers=layers), tmp_path / "model.onnx")
        counts.append(Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node))
    assert dict(counts[1] - counts[0]) == LAYER
    assert counts[2] - counts[1] == Counter({kind: 2 * count for kind, count in LAYER.items()})
    assert counts[0]["Shape"] == 1
    assert counts[0].total() < 108  # Einsum did some of the Transposes by itself


@pytest.mark.parametrize("opset", [17, 18, 19, 20, 21, 22, 23])
def test_every_opset_gives_the_same_numbers(tmp_path: Path, opset: int) -> None:
    model = make(num_layers=1, residual="copy", context_attention="causal")
    to_onnx(model, tmp_path / "model.onnx", opset=opset, facts={"model_version": "1.2.0"})
    graph = onnx.load(tmp_path / "model.onnx")
    assert [(given.domain, given.version) for given in graph.opset_import] == [("", opset)]
    assert {entry.key: entry.value for entry in graph.metadata_props}["model_version"] == "1.2.0"
    context, query, mask = requests(10)
    feeds = {"context": context, "context_mask": mask, "query": query}
    (got,) = session(tmp_path / "model.onnx").run(None, feeds)
    np.testing.assert_allclose(got, answers(model, context, query, mask), atol=1e-5)


@pytest.mark.parametrize("opset", [16, 24])
def test_other_opsets_are_refused(tmp_path: Path, opset: int) -> None:
    with pytest.raises(ExportError, match=f"opset {opset} is not supported; choose 17 to 23"):
        to_onnx(make(), tmp_path / "model.onnx", opset=opset)


def test_every_affine_map_is_one_matmul(exported: Any) -> None:
    """Three projections, four of the first layer (query, key and value in one, output, MLP), six of the last.

    The last layer asks for [PRED] alone, so its queries are computed apart. The two products of activations
    per layer are attention's own; GELU and LayerNorm are single nodes.
    """
    kinds = Counter(node.op_type for node in exported.graph.node)
    weights = {value.name for value in exported.graph.initializer}
    affine = [node for node in exported.graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    assert len(affine) == 3 + 4 + 6
    assert kinds["MatMul"] == len(affine) + 2 * 2
    assert "Einsum" not in kinds
    assert kinds["Gelu"] == 2
    assert kinds["LayerNormalization"] == 2 * 2 + 1
    constant = [node.op_type for node in exported.graph.node if set(node.input) <= weights]
    assert constant == []


def test_weights_beyond_protobufs_limit_go_into_a_second_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    context, query, mask = requests(10)
    monkeypatch.setattr(module, "LARGEST", 1000)
    to_onnx(model, tmp_path / "model.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert (tmp_path / "model.onnx").stat().st_size < 200_000 < (tmp_path / "model.onnx.data").stat().st_size
    feeds = {"context": context, "context_mask": mask, "query": query}
    (got,) = session(tmp_path / "model.onnx").run(None, feeds)
    np.testing.assert_allclose(got, answers(model, context, query, mask), atol=1e-5)


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(ExportError, match=r'jax2onnx .*pip install "prime-jax\[onnx\]"'):
        to_onnx(make(), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []

"""No row of a batch changes another one's answer, and an empty batch is answered with none."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import steered_models
import tiny_bert
import torch
from onnxruntime import quantization
from predictors import LLAMA, D, N, make, session

from prime_jax.errors import ExportError
from prime_jax.export import integers, torch_jasper
from prime_jax.export.batch_independence import batch_independence
from prime_jax.export.einsums import replace_einsums
from prime_jax.export.golden import golden_inputs, jax_answers
from prime_jax.export.interfaces import interface_of
from prime_jax.export.quantize import PRECISIONS, file_of, quantize
from prime_jax.export.text import write_encoder_onnx
from prime_jax.export.to_onnx import to_onnx
from prime_jax.pretrained.bert import BertTextEncoder

MODELS = {
    "full": (lambda: make(residual="linear", max_delta=0.3), 20),
    "causal": (lambda: make(residual="copy", context_attention="causal"), 17),
    "llama": (lambda: make(residual="copy", **LLAMA), 20),
    "subspace": (lambda: steered_models.make("subspace"), 20),
}
FILES = {precision: file_of(precision) for precision in PRECISIONS}


@pytest.fixture(scope="module", params=MODELS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with a file of every precision, and golden requests."""
    build, opset = MODELS[request.param]
    model, folder = build(), tmp_path_factory.mktemp(request.param)
    to_onnx(model, folder / "model.onnx", opset=opset)
    for precision in PRECISIONS[1:]:
        quantize(folder / "model.onnx", folder / file_of(precision), precision)
    golden = golden_inputs(model.config)
    return folder, golden | jax_answers(model, golden)


EMPTY = """
import sys, numpy, onnxruntime
for path in sys.argv[1:]:
    session = onnxruntime.InferenceSession(path)
    shapes = {given.name: [0, *given.shape[1:]] for given in session.get_inputs()}
    types = {"tensor(bool)": bool, "tensor(float)": "float32", "tensor(int32)": "int32"}
    feeds = {given.name: numpy.zeros([3 if isinstance(size, str) else size for size in shapes[given.name]],
             types[given.type]) for given in session.get_inputs()}
    print([answer.shape for answer in session.run(None, feeds)])
"""


def empty_batch(*paths: Path) -> list[str]:
    """The shapes that files answer, in a process of its own, for the fault ended it."""
    command = [sys.executable, "-c", EMPTY, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_an_empty_batch_has_no_answers(exported: Any) -> None:
    folder, golden = exported
    width = golden["routing"].shape[1] if "routing" in golden else None
    shapes = [(0, D)] if width is None else [(0, D), (0, width), (0, D), (0, D)]
    assert empty_batch(*(folder / name for name in FILES.values())) == [str(shapes)] * len(FILES)


def test_an_encoder_answers_an_empty_batch(tmp_path: Path) -> None:
    tiny_bert.write_folder(tmp_path / "encoder", tiny_bert.tensors())
    assert write_encoder_onnx(BertTextEncoder(tmp_path / "encoder"), tmp_path / "model.onnx") < 1e-5
    assert empty_batch(tmp_path / "model.onnx") == [str([(0, tiny_bert.HIDDEN)])]


def test_a_row_of_norm_100_changes_nobody_elses_answer(exported: Any) -> None:
    """With one scale for a whole batch the cosine fell to 0.49 here."""
    folder, golden = exported
    rows = {name: golden[name][1:4] for name in ("context", "context_mask", "query")}
    loud = {name: array if array.dtype == bool else 100 * array for name, array in rows.items()}
    for precision, name in FILES.items():
        model = session(folder / name)
        alone = [
            model.run(["embedding"], {key: array[row : row + 1] for key, array in rows.items()})[0][0]
            for row in range(3)
        ]
        both = {key: np.concatenate([loud[key], array]) for key, array in rows.items()}
        beside = model.run(["embedding"], both)[0][3:]
        room = 1e-5 if precision != "fp16" else 2e-3
        np.testing.assert_allclose(beside, np.stack(alone), atol=room)
        cosines = (np.stack(alone) * golden["embedding"][1:4]).sum(axis=1)
        assert cosines.min() > {"fp32": 0.999999, "fp16": 0.9999, "int8": 0.99}[precision]


def test_the_figure_of_every_precision(exported: Any, request: pytest.FixtureRequest) -> None:
    folder, golden = exported
    build, _ = MODELS[request.node.callspec.params["exported"]]
    found = batch_independence(interface_of(build().config), golden, folder, FILES)
    assert "padding" not in found  # their length is fixed
    assert (found["rows"], found["norm"]) == (64, 100.0)
    assert list(found["max_abs_difference"]) == list(PRECISIONS)
    assert max(found["max_abs_difference"].values()) < 2e-3
    assert found["max_abs_difference"]["fp32"] <= 1e-6


def test_a_file_with_one_scale_for_the_batch_is_refused(tmp_path: Path) -> None:
    """What ONNX Runtime's dynamic quantisation writes, and what older bundles hold."""
    model = make(residual="copy")
    to_onnx(model, tmp_path / "model.onnx")
    logging.disable()
    try:
        quantization.quantize_dynamic(tmp_path / "model.onnx", tmp_path / "shared.onnx")
    finally:
        logging.disable(logging.NOTSET)
    golden = golden_inputs(model.config)
    golden |= jax_answers(model, golden)
    with pytest.raises(ExportError, match=r"shared\.onnx: an answer in company differs by 0\.\d+ from"):
        batch_independence(interface_of(model.config), golden, tmp_path, {"int8": "shared.onnx"})


def small_graph(kind: str, shapes: dict[str, list[Any]], constants: dict[str, Any], **more: Any) -> Any:
    """A graph of one node; inputs of these shapes, and constants."""
    given = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    ]
    node = onnx.helper.make_node(kind, [*shapes, *constants], ["y"], **more)
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    kept = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = onnx.helper.make_graph([node], "small", given, [out], kept)
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(made))


@pytest.mark.parametrize(
    "equation",
    [
        *("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd", "abc,c->ab", "bn,bnd->bd", "ab,bc->ca", "bgqd,bkd->bgqk"),
        *("...i,...io->...o", "...i,io->...o", "ab,ab->a"),
    ],
)
def test_products_in_place_of_einsums(equation: str) -> None:
    rng, sizes = np.random.default_rng(0), dict(zip("abcdghiknoq", range(2, 13), strict=True))
    terms = equation.partition("->")[0].split(",")
    shapes = [
        [*([2, 3] if "..." in term else []), *(sizes[letter] for letter in term.strip("."))] for term in terms
    ]
    left, right = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    graph = small_graph("Einsum", {"l": list(left.shape), "r": list(right.shape)}, {}, equation=equation)
    replace_einsums(graph)
    assert "Einsum" not in {node.op_type for node in graph.graph}
    runtime = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString())
    (got,) = runtime.run(None, {"l": left, "r": right})
    np.testing.assert_allclose(got, np.einsum(equation, left, right), atol=1e-5)


@pytest.mark.parametrize("equation", ["ab,bc->abc", "aab,bc->ac", "ab,c->a"])
def test_other_einsums_are_refused(equation: str) -> None:
    shapes = {"l": [2] * (len(equation.split(",")[0])), "r": [2] * len(equation.split(",")[1].split("-")[0])}
    with pytest.raises(ExportError, match="no matrix product does what Einsum"):
        replace_einsums(small_graph("Einsum", shapes, {}, equation=equation))


def test_integers_give_what_numpy_gives_with_a_scale_per_row() -> None:
    """Rows of very different size, a row of zeros, and every sum of two products within 16 bits."""
    assert 2 * (integers.MIDDLE + integers.STEPS) * integers.WEIGHT_STEPS < 2**15
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(2, 3, 40)) * 10.0 ** np.arange(-3, 3).reshape(2, 3, 1)).astype(np.float32)
    rows[0, 1] = 0
    matrix = rng.normal(size=(40, 8)).astype(np.float32)
    graph = small_graph("MatMul", {"x": ["B", 3, 40]}, {"w": matrix})
    integers.to_integers(graph)
    kinds = {node.op_type for node in graph.graph}
    assert {"QuantizeLinear", "MatMulInteger"} <= kinds
    assert "MatMul" not in kinds
    runtime = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString())
    (got,) = runtime.run(None, {"x": rows})
    sizes = np.abs(rows).max(axis=-1, keepdims=True)
    scales = sizes * np.float32(1 / 127)
    ints = np.rint(np.divide(rows, scales, where=scales > 0, out=np.zeros_like(rows)))
    columns = np.abs(matrix).max(axis=0) / 63
    expected = (ints @ np.rint(matrix / columns)) * scales * columns
    one = np.where(sizes > 0, sizes, 1)
    np.testing.assert_allclose(got / one, expected / one, atol=1e-4)
    np.testing.assert_allclose(got / one, rows @ matrix / one, atol=0.3)  # of sums of 40 products


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_integers_carry_what_is_no_number(bad: float) -> None:
    """Into the answers of its row alone; ONNX Runtime's maximum loses NaN, and an integer cannot hold it."""
    rng = np.random.default_rng(0)
    rows, matrix = rng.normal(size=(4, 3, 40)).astype(np.float32), rng.normal(size=(40, 8))
    graph = small_graph("MatMul", {"x": ["B", 3, 40]}, {"w": matrix.astype(np.float32)})
    integers.to_integers(graph)
    runtime = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString())
    (expected,) = runtime.run(None, {"x": rows})
    assert np.isfinite(expected).all()
    rows[2, 1, 7] = bad
    (got,) = runtime.run(None, {"x": rows})
    assert np.isnan(got[2, 1]).all()
    got[2, 1] = expected[2, 1]
    np.testing.assert_array_equal(got, expected)


def test_nan_in_a_turn_or_a_query_is_answered_with_nan_in_every_precision(exported: Any) -> None:
    folder, golden = exported
    rows = {name: golden[name][:4].copy() for name in ("context", "context_mask", "query")}
    for file in FILES.values():
        model = session(folder / file)
        (expected,) = model.run(["embedding"], rows)
        for name in ("context", "query"):
            spoilt = {key: array.copy() for key, array in rows.items()}
            row = int(np.flatnonzero(rows["context_mask"].any(axis=1))[0])
            turn = int(np.flatnonzero(rows["context_mask"][row])[0])
            spoilt[name][(row, turn, 0) if name == "context" else (row, 0)] = np.nan
            (got,) = model.run(["embedding"], spoilt)
            assert np.isnan(got[row]).all(), (file, name)
            others = np.arange(4) != row
            np.testing.assert_array_equal(got[others], expected[others])


@pytest.mark.parametrize("fields", [{}, {"residual": "linear", "context_attention": "causal"}, LLAMA])
@pytest.mark.parametrize("gradients", [True, False])
def test_torch_answers_an_empty_batch(fields: dict[str, Any], gradients: bool) -> None:
    from test_export_parity import in_torch

    module = in_torch(make(**fields))
    for turns in (0, 1, N):
        mask = torch.ones(0, turns, dtype=torch.bool)
        with torch.set_grad_enabled(gradients):
            for given in (None, mask):
                assert module(torch.zeros(0, turns, D), torch.zeros(0, D), given).shape == (0, D)


def test_torch_answers_no_question() -> None:
    config = torch_jasper.SubspaceConfig(input_dim=D, output_dim=D, hidden_dim=32, num_subspaces=5)
    module = torch_jasper.DecomposedJasperPredictor(config)
    found = module.explain(torch.zeros(0, D), torch.zeros(0, D))
    assert (found.embedding.shape, found.routing.shape) == ((0, D), (0, 5))
    assert module.predict(torch.zeros(0, D)).shape == (0, D)

"""Steered models: JAX, ONNX Runtime and torch give the same prediction and the same explanation of it."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from predictors import session
from steered_models import D, K, Steered, answers, feeds, make, requests

from prime_jax.errors import ExportError
from prime_jax.export import torch_jasper
from prime_jax.export.to_onnx import to_onnx
from prime_jax.export.to_torch import state_dict

CASES: list[tuple[str, dict[str, Any]]] = [
    ("jasper", {}),
    ("jasper", {"output_dim": 7, "num_layers": 1}),
    ("jasper", {"residual": "query", "num_layers": 3}),
    ("jasper", {"residual": "query", "max_delta": 0.3}),
    ("subspace", {}),
    ("subspace", {"fine_input": "add", "num_layers": 1}),
    ("subspace", {"routing": "argmax", "residual": "query"}),
    ("subspace", {"routing": "argmax", "fine_input": "add", "residual": "query", "max_delta": 0.3}),
]
ROWS = 33


class Exported(NamedTuple):
    """One model in two foreign forms, and what JAX says to 33 requests."""

    session: onnxruntime.InferenceSession
    module: torch_jasper.JasperPredictor
    inputs: tuple[np.ndarray, np.ndarray, np.ndarray]
    expected: dict[str, np.ndarray]


@pytest.fixture(scope="module", params=CASES, ids=str)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    kind, fields = request.param
    model = make(kind, **fields)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    to_onnx(model, path)
    given = requests(ROWS)
    return Exported(session(path), in_torch(model), given, answers(model, *given))


def in_torch(model: Steered) -> torch_jasper.JasperPredictor:
    """Its weights in the torch module, where every name has to fit."""
    subspaces = model.config.kind == "subspace"
    kind = torch_jasper.SubspaceConfig if subspaces else torch_jasper.JasperConfig
    config = kind(**{name: getattr(model.config, name) for name in kind.__dataclass_fields__})
    module = (torch_jasper.DecomposedJasperPredictor if subspaces else torch_jasper.JasperPredictor)(config)
    tensors = {name: torch.from_numpy(array) for name, array in state_dict(model).items()}
    module.load_state_dict(tensors, strict=True)
    assert module.get_num_params() == model.num_params()
    return module.eval()


@pytest.mark.parametrize("batch", [1, 3, ROWS])
def test_onnxruntime_agrees_in_every_output_and_batch_size(exported: Exported, batch: int) -> None:
    names = [output.name for output in exported.session.get_outputs()]
    assert names == list(exported.expected)
    for start in range(0, ROWS, batch):
        rows = slice(start, start + batch)
        got = exported.session.run(names, feeds(*(array[rows] for array in exported.inputs)))
        for name, array in zip(names, got, strict=True):
            np.testing.assert_allclose(array, exported.expected[name][rows], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("batch", [1, 3, ROWS])
@pytest.mark.parametrize("gradients", [True, False])
def test_torch_agrees_in_every_output_and_batch_size(exported: Exported, batch: int, gradients: bool) -> None:
    given = [torch.from_numpy(array) for array in exported.inputs]
    for start in range(0, ROWS, batch):
        rows = [array[start : start + batch] for array in given]
        with torch.set_grad_enabled(gradients):
            got = exported.module.details(*rows)._asdict()
            assert torch.equal(exported.module(*rows), got["embedding"])
        assert (got["routing"] is None) == ("routing" not in exported.expected)
        for name, array in exported.expected.items():
            expected = array[start : start + batch]
            np.testing.assert_allclose(got[name].detach(), expected, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "exported", [case for case in CASES if case[0] == "subspace"], ids=str, indirect=True
)
def test_the_same_subspace_is_chosen_and_the_parts_make_the_whole(exported: Exported) -> None:
    """Five subspaces, most of them chosen by some row; routing sums to 1; prediction = coarse + fine."""
    names = ["embedding", "routing", "coarse", "fine"]
    by_onnx = dict(zip(names, exported.session.run(names, feeds(*exported.inputs)), strict=True))
    with torch.inference_mode():
        by_torch = exported.module.details(*map(torch.from_numpy, exported.inputs))._asdict()
    choice = exported.expected["routing"].argmax(axis=1)
    assert len(set(choice)) > 2
    for found in (by_onnx, {name: by_torch[name].numpy() for name in names}, exported.expected):
        np.testing.assert_array_equal(found["routing"].argmax(axis=1), choice)
        np.testing.assert_allclose(found["routing"].sum(axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(found["embedding"], found["coarse"] + found["fine"], atol=1e-7)
        np.testing.assert_allclose(np.linalg.norm(found["embedding"], axis=1), 1, atol=1e-6)
        centroids = exported.module.centroids.numpy()
        np.testing.assert_allclose(found["coarse"], found["routing"] @ centroids, atol=1e-5)


def test_no_steering_is_zero_steering_and_steering_matters(exported: Exported) -> None:
    """Masked garbage, a vector of zeros and, in torch, no turn at all: one answer. With steering another."""
    context, query, mask = exported.inputs
    none = ~mask[:, 0]
    zeros = feeds(np.zeros_like(context), query, np.ones_like(mask))
    by_onnx = exported.session.run(["embedding"], zeros)[0]
    expected = exported.expected["embedding"]
    np.testing.assert_allclose(by_onnx[none], expected[none], atol=1e-5)
    assert np.abs(by_onnx - expected)[~none].max(axis=1).min() > 1e-3
    question = torch.from_numpy(query)
    for got in (
        exported.module.predict(question),
        exported.module.predict(question, torch.zeros_like(question)),
        exported.module(torch.zeros(ROWS, 0, D), question).detach(),
    ):
        np.testing.assert_allclose(got, by_onnx, atol=1e-5)
    steered = exported.module.predict(question[~none], torch.from_numpy(context[~none, 0]))
    np.testing.assert_allclose(steered, expected[~none], atol=1e-5)


def test_the_onnx_interface_of_a_model_with_subspaces(tmp_path: Path) -> None:
    """Names, types, shapes and words; only the batch is free."""
    to_onnx(make("subspace", routing="argmax"), tmp_path / "model.onnx", facts={"model_version": "1.2.0"})
    graph = onnx.load(tmp_path / "model.onnx")

    def described(value: Any) -> tuple[str, int, list[Any]]:
        tensor = value.type.tensor_type
        return value.name, tensor.elem_type, [d.dim_param or d.dim_value for d in tensor.shape.dim]

    FLOAT, BOOL = onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL
    assert [described(value) for value in graph.graph.input] == [
        ("context", FLOAT, ["B", 1, D]),
        ("context_mask", BOOL, ["B", 1]),
        ("query", FLOAT, ["B", D]),
    ]
    assert [described(value) for value in graph.graph.output] == [
        ("embedding", FLOAT, ["B", D]),
        ("routing", FLOAT, ["B", K]),
        ("coarse", FLOAT, ["B", D]),
        ("fine", FLOAT, ["B", D]),
    ]
    assert graph.graph.input[0].doc_string.startswith("Steering vector in the place of the one turn")
    assert all(value.doc_string for value in (*graph.graph.input, *graph.graph.output))
    facts = {entry.key: entry.value for entry in graph.metadata_props}
    assert facts.pop("prime_jax")
    assert facts == {
        **{"kind": "subspace", "input_dim": f"{D}", "output_dim": f"{D}", "max_context_length": "1"},
        **{"normalised": "true", "residual": "none", "num_subspaces": f"{K}", "routing": "argmax"},
        **{"precision": "fp32", "model_version": "1.2.0"},
    }
    kinds = [node.op_type for node in graph.graph.node]
    assert not any("Random" in kind for kind in kinds)  # no Gumbel noise
    assert kinds.count("LayerNormalization") == kinds.count("Gelu") == 2 * 5


@pytest.mark.parametrize("opset", [17, 23])
def test_other_opsets_give_the_same_numbers(tmp_path: Path, opset: int) -> None:
    model = make("subspace", routing="argmax", residual="query", max_delta=0.3)
    to_onnx(model, tmp_path / "model.onnx", opset=opset)
    given = requests(9)
    got = session(tmp_path / "model.onnx").run(None, feeds(*given))
    for (name, expected), array in zip(answers(model, *given).items(), got, strict=True):
        np.testing.assert_allclose(array, expected, atol=1e-5, err_msg=name)


def test_a_model_without_centroids_is_no_onnx_file(tmp_path: Path) -> None:
    model = make("subspace")
    model.centroids[...] = 0 * model.centroids[...]
    with pytest.raises(ExportError, match="all its centroids are zero, it was never trained on data with"):
        to_onnx(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []

"""JAX, ONNX Runtime and the torch runtime give the same numbers, whatever the mode, residual, N and batch."""

from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
from predictors import LLAMA, N, answers, make, requests, session

from prime_jax.export import torch_llama, torch_runtime
from prime_jax.export.to_onnx import to_onnx
from prime_jax.export.to_torch import state_dict

SIZES = [(128, 2, 4), (256, 3, 8)]  # hidden_dim, num_layers, num_heads
CASES = [  # context_attention, residual, max_delta, size
    *product(("full", "prefix", "causal"), ("none", "copy"), (None,), SIZES),
    ("full", "copy", 0.3, SIZES[0]),
    ("causal", "linear", 0.3, SIZES[0]),
    ("causal", "query", 0.3, SIZES[0]),
    ("full", "linear", None, "llama"),
    ("causal", "none", None, "llama"),
]


class Exported(NamedTuple):
    """One model in two foreign forms, and what JAX says to 64 requests."""

    session: onnxruntime.InferenceSession
    module: torch_runtime.EmbeddingPredictor
    inputs: tuple[np.ndarray, np.ndarray, np.ndarray]
    expected: np.ndarray


@pytest.fixture(scope="module", params=CASES, ids=str)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    mode, residual, max_delta, size = request.param
    shape = (
        LLAMA if size == "llama" else dict(zip(("hidden_dim", "num_layers", "num_heads"), size, strict=True))
    )
    model = make(context_attention=mode, residual=residual, max_delta=max_delta, **shape)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    to_onnx(model, path)
    return Exported(
        session=session(path),
        module=in_torch(model),
        inputs=requests(64),
        expected=answers(model, *requests(64)),
    )


def in_torch(model: object) -> torch_runtime.EmbeddingPredictor:
    fields = torch_runtime.PredictorConfig.__dataclass_fields__
    known = model.config.model_dump()
    config = torch_runtime.PredictorConfig(**{name: known[name] for name in fields})
    assert torch_llama.BLOCKS is torch_runtime.BLOCKS  # with such layers in it
    module = torch_runtime.EmbeddingPredictor(config)
    module.load_state_dict({name: torch.from_numpy(array) for name, array in state_dict(model).items()})
    return module.eval()


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_onnxruntime_agrees_in_every_batch_size(exported: Exported, batch: int) -> None:
    """64 rows hold every number of turns from 0 to N, with NaN or huge numbers in the padding."""
    context, query, mask = exported.inputs
    for start in range(0, 64 if batch == 64 else 2 * (N + 1) * batch, batch):
        rows = slice(start, start + batch)
        feeds = {"context": context[rows], "context_mask": mask[rows], "query": query[rows]}
        (got,) = exported.session.run(["embedding"], feeds)
        np.testing.assert_allclose(got, exported.expected[rows], atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("gradients", [True, False])
def test_torch_agrees_in_every_batch_size(exported: Exported, batch: int, gradients: bool) -> None:
    """With gradients and without: torch may take other kernels then."""
    context, query, mask = map(torch.from_numpy, exported.inputs)
    for start in range(0, 64 if batch == 64 else 2 * (N + 1) * batch, batch):
        rows = slice(start, start + batch)
        with torch.set_grad_enabled(gradients):
            got = exported.module(context[rows], query[rows], mask[rows])
        np.testing.assert_allclose(got.detach(), exported.expected[rows], atol=1e-5)


@pytest.mark.parametrize("turns", range(N + 1))
def test_torch_agrees_without_padding_for_every_n(exported: Exported, turns: int) -> None:
    context, query, mask = exported.inputs
    rows = np.flatnonzero(mask.sum(axis=1) == turns)
    unpadded = np.stack([context[row, mask[row]] for row in rows])
    got = exported.module(torch.from_numpy(unpadded), torch.from_numpy(query[rows]))
    np.testing.assert_allclose(got.detach(), exported.expected[rows], atol=1e-5)


def test_the_requests_cover_what_they_should(exported: Exported) -> None:
    context, _, mask = exported.inputs
    assert set(mask.sum(axis=1)) == set(range(N + 1))
    assert np.isnan(context[~mask]).any()
    assert (context[~mask] == 1e4).any()
    np.testing.assert_allclose(np.linalg.norm(exported.expected, axis=1), 1, atol=1e-6)
    assert np.abs(np.diff(exported.expected, axis=0)).max(axis=1).min() > 1e-2  # no two rows alike


def test_a_single_layer_and_a_rectangular_model(tmp_path: Path) -> None:
    """The only layer is also the last one, and output_dim differs from input_dim."""
    model = make(num_layers=1, output_dim=7)
    context, query, mask = requests(10)
    expected = answers(model, context, query, mask)
    to_onnx(model, tmp_path / "model.onnx")
    feeds = {"context": context, "context_mask": mask, "query": query}
    (got,) = session(tmp_path / "model.onnx").run(None, feeds)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    got = in_torch(model)(*map(torch.from_numpy, (context, query, mask)))
    np.testing.assert_allclose(got.detach(), expected, atol=1e-5)

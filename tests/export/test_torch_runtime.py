"""The file that goes to PyTorch users: its checks, its training mode and its own safetensors reader."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from prime_jax.export.torch_runtime import (
    CheckpointError,
    EmbeddingPredictor,
    PredictorConfig,
    PredictorError,
    read_safetensors,
)
from prime_jax.models.prime import COPY_DECAY, COPY_WEIGHT

D, N = 12, 4


def make(**fields: object) -> EmbeddingPredictor:
    torch.manual_seed(0)
    shape = {"input_dim": D, "hidden_dim": 128, "output_dim": D, "num_layers": 2, "num_heads": 4}
    return EmbeddingPredictor(PredictorConfig(**(shape | {"max_context_length": N} | fields))).eval()


@pytest.mark.parametrize(
    ("context", "query", "mask", "message"),
    [
        (torch.zeros(4, 3, 10), torch.zeros(4, D), None, "dimension 10, the model takes 12"),
        (torch.zeros(4, 3, D), torch.zeros(2, D), None, r"query has shape \(2, 12\), expected \(4, 12\)"),
        (torch.zeros(4, 5, D), torch.zeros(4, D), None, "5 turns, the model takes at most 4"),
        (torch.zeros(4, D), torch.zeros(4, D), None, "must have shape"),
        (torch.zeros(4, 3, D), torch.zeros(4, D).long(), None, "query torch.int64, expected floating"),
        (torch.zeros(4, 3, D), torch.zeros(4, D), torch.ones(4, 2).bool(), r"\(4, 2\), expected torch.bool"),
        (torch.zeros(4, 3, D), torch.zeros(4, D), torch.ones(4, 3), "torch.float32 .*expected torch.bool"),
    ],
)
def test_bad_inputs_are_named(
    context: torch.Tensor, query: torch.Tensor, mask: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(PredictorError, match=message):
        make()(context, query, mask)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 3}, "not divisible"),
        ({"block": "mamba"}, "block 'mamba' is none of gelu"),
        ({"residual": "sum"}, "'sum' is none of none, query, copy"),
        ({"context_attention": "all"}, "'all' is none of full, prefix, causal"),
    ],
)
def test_bad_configs_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(PredictorError, match=message):
        make(**fields)


@pytest.mark.parametrize("mode", ["full", "prefix", "causal"])
def test_padding_yields_no_nan_in_answers_or_gradients(mode: str) -> None:
    """Requests without any turn leave padded slots that see nobody."""
    model = make(context_attention=mode, residual="copy", max_delta=0.5)
    context = torch.full((2, N, D), float("nan"), requires_grad=True)
    query = torch.randn(2, D, requires_grad=True)
    model(context, query, torch.zeros(2, N, dtype=torch.bool))[:, 0].sum().backward()
    assert float(context.grad.abs().max()) == 0
    for tensor in (query, *model.parameters()):
        assert bool(torch.isfinite(tensor.grad).all())


def test_fresh_weights_start_at_the_same_baseline_as_in_jax() -> None:
    """Gate zero: the query plus the recency-weighted turns."""
    context, query = torch.randn(1, 2, D), torch.randn(1, D)
    expected = query + COPY_WEIGHT * (COPY_DECAY * context[:, 0] + context[:, 1])
    expected = expected / expected.norm()
    with torch.inference_mode():
        for residual in ("copy", "linear"):
            np.testing.assert_allclose(make(residual=residual)(context, query), expected, atol=1e-6)


def test_dropout_is_on_in_training_only() -> None:
    model, inputs = make(dropout=0.5), (torch.randn(2, 3, D), torch.randn(2, D))
    with torch.inference_mode():
        still = [model(*inputs) for _ in range(2)]
        model.train()
        moving = [model(*inputs) for _ in range(2)]
    assert torch.equal(*still)
    assert float((moving[0] - moving[1]).abs().max()) > 1e-2


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    arrays = {
        "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
        "scalar": np.array(2.5, np.float32),
        "mask": np.array([[True, False, True]]),
        "empty": np.zeros((0, 4), np.float32),
    }
    save_file(arrays, tmp_path / "file.safetensors", metadata={"format": "np"})
    tensors = read_safetensors(tmp_path / "file.safetensors")
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        assert tensors[name].numpy().dtype == array.dtype
        np.testing.assert_array_equal(tensors[name], array)


def safetensors(entry: object, data: bytes = bytes(8), header: bytes | None = None) -> bytes:
    text = header if header is not None else json.dumps({"a": entry}).encode()
    return struct.pack("<Q", len(text)) + text + data


RIGHT = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header is longer than the file"),
        (b"\xff" * 8 + b"{}", "header is longer than the file"),
        (safetensors(None, header=b"{not json"), "not a safetensors file"),
        (safetensors(None, header=b"[]"), "not a safetensors file"),
        (safetensors("F32"), "not a safetensors file"),
        (safetensors(RIGHT | {"dtype": "F64"}), "not a safetensors file.*F64"),
        (safetensors(RIGHT | {"shape": [3]}), "'a' does not lie where it should"),
        (safetensors(RIGHT | {"shape": [-2]}), "'a' does not lie where it should"),
        (safetensors(RIGHT | {"data_offsets": [-8, 0]}), "'a' does not lie where it should"),
        (safetensors(RIGHT | {"data_offsets": [4, 12]}, bytes(12)), "'a' does not lie where it should"),
        (safetensors(RIGHT, bytes(7)), "'a' ends after the file"),
        (safetensors(RIGHT, bytes(9)), "bytes that belong to no tensor"),
    ],
)
def test_a_broken_header_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"file\.safetensors: damaged, .*{message}"):
        read_safetensors(path)
    path.write_bytes(safetensors(RIGHT))
    assert read_safetensors(path)["a"].tolist() == [0.0, 0.0]


def inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(rows, N, D), torch.randn(rows, D), torch.rand(rows, N) > 0.4


@pytest.mark.parametrize("residual", ["none", "linear"])
def test_a_checkpoint_comes_back(tmp_path: Path, residual: str) -> None:
    model = make(residual=residual, context_attention="prefix")
    model.save_checkpoint(tmp_path / "model.pt")
    loaded = EmbeddingPredictor.load_checkpoint(tmp_path / "model.pt")
    assert loaded.config == model.config
    assert not loaded.training
    torch.testing.assert_close(loaded(*inputs(6)), model(*inputs(6)), rtol=0, atol=0)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]


def test_a_flipped_byte_of_weights_or_config_in_a_checkpoint_is_caught(tmp_path: Path) -> None:
    model, path = make(), tmp_path / "model.pt"
    model.save_checkpoint(path)
    whole = path.read_bytes()
    values = whole.find(model.layers[0].mlp[0].weight.detach().numpy().tobytes())
    assert values > 0
    heads = whole.find(b"num_heads") + len("num_heads") + 3  # behind the memo: the number itself
    assert whole[heads] == 4
    for place in (values, values + 50_001, heads):
        data = bytearray(whole)
        data[place] ^= 0x10
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"model\.pt: damaged"):
            EmbeddingPredictor.load_checkpoint(path)


class Code:
    """Pickles as a call that would leave a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_a_file_that_holds_code_is_refused_unopened(tmp_path: Path) -> None:
    torch.save({"config": Code(tmp_path / "ran"), "state_dict": {}}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt: holds more than tensors, numbers and text"):
        EmbeddingPredictor.load_checkpoint(tmp_path / "model.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": torch.zeros(2)}, "not written by save_checkpoint: it lacks config or state_dict"),
        (torch.zeros(2), "holds Tensor, not tensors by name"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=message):
        EmbeddingPredictor.load_checkpoint(tmp_path / "model.pt")


def test_missing_and_unwritable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.pt: cannot be read"):
        EmbeddingPredictor.load_checkpoint(tmp_path / "nowhere.pt")
    with pytest.raises(CheckpointError, match=r"nowhere/model\.pt: cannot be written"):
        make().save_checkpoint(tmp_path / "nowhere" / "model.pt")


@pytest.mark.parametrize("residual", ["none", "linear"])
def test_exports_for_any_batch_with_torch_export(residual: str) -> None:
    model, batch = make(residual=residual), torch.export.Dim("B")
    shapes = {name: {0: batch} for name in ("context", "query", "context_mask")}
    program = torch.export.export(model, inputs(3), dynamic_shapes=shapes).module()
    for rows in (1, 3, 64):
        torch.testing.assert_close(program(*inputs(rows)), model(*inputs(rows)), rtol=0, atol=1e-6)


def test_compiles_without_a_graph_break() -> None:
    """Backend `eager`: the capture alone, as no C++ compiler is needed then."""
    model = make(residual="linear", context_attention="causal")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs(5)), model(*inputs(5)), rtol=0, atol=1e-6)

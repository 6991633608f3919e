"""Those that `latency.py` times, each in its own process, with the same requests and weights.

A contender is a function that gets the folder with the weights and gives back `call(batch) -> embeddings`,
which takes numpy arrays and returns numpy arrays, as a service would have them.
"""

import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

Call = Callable[[int], np.ndarray]
TURNS = 10


def requests(batch: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Full windows and queries, unit vectors, the same for every contender: `[B, N, D]` and `[B, D]`."""
    random = np.random.default_rng(batch)
    vectors = random.normal(size=(batch, TURNS + 1, size)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors[:, :TURNS].copy(), vectors[:, TURNS].copy()


def serve(name: str, folder: Path, batches: tuple[int, ...], pipe: Connection) -> None:
    """Run one contender: send its answers, then time as many calls as the parent asks for."""
    try:
        call = CONTENDERS[name](folder, batches)
        answers = {batch: call(batch) for batch in batches}
    except Exception as unavailable:  # the parent reports it and goes on with the others
        pipe.send(f"{type(unavailable).__name__}: {str(unavailable).strip().splitlines()[-1][:200]}")
        return
    pipe.send(answers)
    while (order := pipe.recv()) is not None:
        batch, times = order
        taken = []
        for _ in range(times):
            started = time.perf_counter()
            call(batch)
            taken.append(time.perf_counter() - started)
        pipe.send(taken)
    pipe.send(_memory())


def _memory() -> dict[str, float]:
    """Peak memory of this process so far, in MB; on a GPU that of the device too."""
    status = Path("/proc/self/status").read_text().splitlines()  # getrusage would count the parent's peak too
    peak = {"host_mb": next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))}
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        peak["device_mb"] = sys.modules["torch"].cuda.max_memory_reserved() / 2**20
    elif "jax" in sys.modules:
        used = sys.modules["jax"].devices()[0].memory_stats()
        if used:
            peak["device_mb"] = used["peak_bytes_in_use"] / 2**20
    return peak


def _model(folder: Path) -> Any:
    from safetensors.numpy import load_file

    from prime_jax.files import read_json
    from prime_jax.models import model_config
    from prime_jax.models.state_dict import load_state_dict

    config = model_config(read_json(folder / "config.json")["model"])
    return load_state_dict(config, load_file(folder / "model.safetensors"))


def _predict(precision: Any, folder: Path, batches: tuple[int, ...]) -> Call:
    from prime_jax.predict.predictor import Predictor

    model = _model(folder)
    most = max(batches[-1], model.config.max_batch_size)
    model.config = model.config.model_copy(update={"max_batch_size": most})
    predictor = Predictor.from_model(model, precision=precision, batch_sizes=batches)
    inputs = {batch: requests(batch, model.config.input_dim) for batch in batches}
    return lambda batch: predictor.predict(*inputs[batch])


def _session(precision: Any, adds: bool, folder: Path, batches: tuple[int, ...]) -> Call:
    """A conversation of nine turns; a call adds the tenth and predicts, or predicts with all ten held."""
    from prime_jax.predict.predictor import Predictor

    model = _model(folder)
    model.config = model.config.model_copy(update={"use_torch_compile": False})
    predictor = Predictor.from_model(model, precision=precision)
    inputs = {batch: requests(batch, model.config.input_dim) for batch in batches}
    sessions = {}
    for batch in batches:
        sessions[batch] = predictor.session(batch, precision=precision)
        for turn in range(TURNS - 1 if adds else TURNS):
            sessions[batch].append(inputs[batch][0][:, turn])
        sessions[batch].prepare()

    def call(batch: int) -> np.ndarray:
        session = sessions[batch]
        if not adds:
            return session.predict(inputs[batch][1])
        _forget_the_tenth(session)
        session.append(inputs[batch][0][:, -1])
        return session.predict(inputs[batch][1])

    return call


def _forget_the_tenth(session: Any) -> None:
    """Back to nine turns held, so that a call always adds the tenth; costs nothing worth timing."""
    session._lengths[:] = TURNS - 1
    session._cached[:] = TURNS - 1


def _torch(dtype: str, how: str, folder: Path, batches: tuple[int, ...]) -> Call:
    import os

    import torch
    from safetensors.torch import load_file

    from prime_jax.export import torch_runtime

    torch.set_num_threads(os.cpu_count() or 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = torch_runtime.EmbeddingPredictor(
        torch_runtime.PredictorConfig.from_json(folder / "config.json")
    )
    model.load_state_dict(load_file(folder / "model.safetensors"))
    model = model.eval().to(device, getattr(torch, dtype))
    size = model.config.input_dim
    if how == "compile":
        model = torch.compile(model, mode="max-autotune" if device == "cuda" else "default", dynamic=False)
    inputs = {batch: requests(batch, size) for batch in batches}

    def eager(batch: int) -> np.ndarray:
        with torch.inference_mode():
            tensors = [torch.from_numpy(array).to(device, getattr(torch, dtype)) for array in inputs[batch]]
            answer: np.ndarray = model(*tensors).float().cpu().numpy()
            return answer

    return _graphed(model, dtype, inputs) if how == "graph" else eager


def _graphed(model: Any, dtype: str, inputs: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> Call:
    """The eager model captured once for each batch size as a CUDA graph, then replayed."""
    import torch

    held: dict[int, tuple[list[Any], Any, Any]] = {}
    with torch.inference_mode():
        for batch, arrays in inputs.items():
            tensors = [torch.from_numpy(array).to("cuda", getattr(torch, dtype)) for array in arrays]
            side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    model(*tensors)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                answer = model(*tensors)
            held[batch] = tensors, graph, answer

    def call(batch: int) -> np.ndarray:
        tensors, graph, answer = held[batch]
        for tensor, array in zip(tensors, inputs[batch], strict=True):
            tensor.copy_(torch.from_numpy(array))
        graph.replay()
        result: np.ndarray = answer.float().cpu().numpy()
        return result

    return call


def _onnx(file: str, folder: Path, batches: tuple[int, ...]) -> Call:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / file), providers=["CPUExecutionProvider"])
    size = session.get_inputs()[-1].shape[-1]
    inputs = {}
    for batch in batches:
        context, query = requests(batch, size)
        inputs[batch] = {"context": context, "context_mask": np.ones(context.shape[:2], bool), "query": query}

    def call(batch: int) -> np.ndarray:
        answer: np.ndarray = session.run(None, inputs[batch])[0]
        return answer

    return call


CONTENDERS: Mapping[str, Callable[[Path, tuple[int, ...]], Call]] = {
    "predict float32": partial(_predict, "float32"),
    "predict bfloat16": partial(_predict, "bfloat16"),
    "session append + predict float32": partial(_session, "float32", True),
    "session append + predict bfloat16": partial(_session, "bfloat16", True),
    "session predict float32": partial(_session, "float32", False),
    "session predict bfloat16": partial(_session, "bfloat16", False),
    "PyTorch eager float32": partial(_torch, "float32", "eager"),
    "PyTorch eager bfloat16": partial(_torch, "bfloat16", "eager"),
    "torch.compile float32": partial(_torch, "float32", "compile"),
    "ONNX Runtime float32": partial(_onnx, "model.onnx"),
    "ONNX Runtime int8": partial(_onnx, "model.int8.onnx"),
    "torch.compile bfloat16": partial(_torch, "bfloat16", "compile"),
    "CUDA-graphed eager bfloat16": partial(_torch, "bfloat16", "graph"),
}
ON_CPU = tuple(
    name for name in CONTENDERS if name not in ("torch.compile bfloat16", "CUDA-graphed eager bfloat16")
)
ON_GPU = tuple(name for name in CONTENDERS if not name.startswith(("ONNX", "torch.compile float32")))

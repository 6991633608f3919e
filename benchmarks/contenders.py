"""Those that `latency.py` times, each in its own process, with the same requests and weights.

A contender is a function that gets the folder with the weights, the batch sizes and `wait` (to be called once
everything is loaded and before anything compiles), and gives back a `Runner`.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.side_by_side import Start, peak_memory

Call = Callable[[int], np.ndarray]
Wait = Callable[[], None]
TURNS = 10


class Runner(NamedTuple):
    """How a contender is run.

    Attributes:
        call: `call(batch) -> embeddings`: numpy arrays in, numpy arrays out, as a service would have them.
        on_device: `on_device(batch, runs)` is the time in seconds of one run of the bare program, its inputs
            on the device and its answer left there, over `runs` in a row; None where that is not measured.
    """

    call: Call
    on_device: Callable[[int, int], float] | None = None


Maker = Callable[[Path, tuple[int, ...], Wait], Runner]


def requests(batch: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Full windows and queries, unit vectors, the same for every contender: `[B, N, D]` and `[B, D]`."""
    random = np.random.default_rng(batch)
    vectors = random.normal(size=(batch, TURNS + 1, size)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors[:, :TURNS].copy(), vectors[:, TURNS].copy()


def serve(name: str, folder: Path, batches: tuple[int, ...], start: Start) -> None:
    """Run one contender: send its answers, then do what the parent asks for.

    An order is `("call", batch, times, unrecorded)`: seconds of so many calls after a few that do not count;
    `("device", batch, runs)`: seconds of a run on the device, or None; or None: the peak memory, and the end.
    """
    try:
        runner = CONTENDERS[name](folder, batches, start.wait)
        answers = {batch: runner.call(batch) for batch in batches}
    except Exception as unavailable:
        start.failed(unavailable)
        return
    start.ready(answers)
    while (order := start.pipe.recv()) is not None:
        kind, batch, times = order[:3]
        if kind == "device":
            start.pipe.send(None if runner.on_device is None else runner.on_device(batch, times))
            continue
        for _ in range(order[3]):
            runner.call(batch)
        taken = []
        for _ in range(times):
            started = time.perf_counter()
            runner.call(batch)
            taken.append(time.perf_counter() - started)
        start.pipe.send(taken)
    start.pipe.send(peak_memory())


def _model(folder: Path) -> Any:
    from safetensors.numpy import load_file

    from prime_jax.files import read_json
    from prime_jax.models import model_config
    from prime_jax.models.state_dict import load_state_dict

    config = model_config(read_json(folder / "config.json")["model"])
    return load_state_dict(config, load_file(folder / "model.safetensors"))


def _predict(precision: Any, folder: Path, batches: tuple[int, ...], wait: Wait) -> Runner:
    from prime_jax.predict.predictor import Predictor

    model = _model(folder)
    most = max(batches[-1], model.config.max_batch_size)
    model.config = model.config.model_copy(update={"max_batch_size": most})
    wait()
    predictor = Predictor.from_model(model, precision=precision, batch_sizes=batches)
    inputs = {batch: requests(batch, model.config.input_dim) for batch in batches}
    return Runner(
        lambda batch: predictor.predict(*inputs[batch]),
        lambda batch, runs: _bare_program(predictor, inputs[batch], runs),
    )


def bare_call(predictor: Any, inputs: tuple[np.ndarray, np.ndarray]) -> Callable[[], Any]:
    """A call of the predictor's own program for such a batch, its packed input on the device already.

    On a GPU the program fetches its input and delivers its answer itself, so it is compiled once more without
    that.

    Args:
        predictor: A `Predictor`.
        inputs: Turns `[B, N, D]`, all of them real, and queries `[B, D]`.

    Returns:
        Starts one run; what comes back can be waited for.
    """
    import jax

    programs = predictor._programs
    size = programs.fixed(len(inputs[1])).packing.batch
    key = (size, predictor.model.config.max_context_length, programs.choice(size).recipe)
    program = programs._traced(key, page_locked=False)()
    packed = program._staging.buffer(program.packing.shape).view
    program.packing.pack(packed, *inputs, np.ones(inputs[0].shape[:2], bool))
    arguments = (jax.device_put(packed), *program._weights)
    return lambda: program._run(*arguments)


def _bare_program(predictor: Any, inputs: tuple[np.ndarray, np.ndarray], runs: int) -> float:
    """Seconds of one run of the compiled program that answers such a batch, all of it on the device."""
    run = bare_call(predictor, inputs)
    run().block_until_ready()
    started = time.perf_counter()
    for _ in range(runs):
        answer = run()
    answer.block_until_ready()
    return (time.perf_counter() - started) / runs


def _session(precision: Any, adds: bool, folder: Path, batches: tuple[int, ...], wait: Wait) -> Runner:
    """A conversation of nine turns; a call adds the tenth and predicts, or predicts with all ten held."""
    from prime_jax.predict.predictor import Predictor

    model = _model(folder)
    model.config = model.config.model_copy(update={"use_torch_compile": False})
    wait()
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

    return Runner(call)


def _forget_the_tenth(session: Any) -> None:
    """Back to nine turns held, so that a call always adds the tenth; costs nothing worth timing."""
    session._lengths[:] = TURNS - 1
    session._cached[:] = TURNS - 1


def _torch(dtype: str, how: str, folder: Path, batches: tuple[int, ...], wait: Wait) -> Runner:
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
    inputs = {batch: requests(batch, size) for batch in batches}
    wait()
    if how == "graph":
        return _graphed(model, getattr(torch, dtype), inputs)
    if how != "eager":
        model = torch.compile(model, mode=how, dynamic=False)

    def call(batch: int) -> np.ndarray:
        with torch.inference_mode():
            tensors = [torch.from_numpy(array).to(device, getattr(torch, dtype)) for array in inputs[batch]]
            answer: np.ndarray = model(*tensors).float().cpu().numpy()
            return answer

    return Runner(call)


def _graphed(model: Any, dtype: Any, inputs: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> Runner:
    """The eager model captured once for each batch size as a CUDA graph, then replayed."""
    import torch

    from benchmarks.cuda_graph import Replayed, capture

    if not torch.cuda.is_available():
        raise RuntimeError("a CUDA graph needs an NVIDIA GPU")
    shapes = {batch: (arrays[0].shape, arrays[1].shape) for batch, arrays in inputs.items()}
    replayed = {
        batch: Replayed(model, shape, dtype, torch.device("cuda"), capture) for batch, shape in shapes.items()
    }
    return Runner(
        lambda batch: replayed[batch](*inputs[batch]),
        lambda batch, runs: replayed[batch].seconds_on_device(runs),
    )


def _onnx(file: str, folder: Path, batches: tuple[int, ...], wait: Wait) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / file), providers=["CPUExecutionProvider"])
    size = session.get_inputs()[-1].shape[-1]
    inputs = {}
    for batch in batches:
        context, query = requests(batch, size)
        inputs[batch] = {"context": context, "context_mask": np.ones(context.shape[:2], bool), "query": query}
    wait()

    def call(batch: int) -> np.ndarray:
        answer: np.ndarray = session.run(None, inputs[batch])[0]
        return answer

    return Runner(call)


CONTENDERS: Mapping[str, Maker] = {
    "predict auto": partial(_predict, "auto"),
    "predict float32": partial(_predict, "float32"),
    "predict bfloat16": partial(_predict, "bfloat16"),
    "session append + predict float32": partial(_session, "float32", True),
    "session append + predict bfloat16": partial(_session, "bfloat16", True),
    "session predict float32": partial(_session, "float32", False),
    "session predict bfloat16": partial(_session, "bfloat16", False),
    "PyTorch eager float32": partial(_torch, "float32", "eager"),
    "PyTorch eager bfloat16": partial(_torch, "bfloat16", "eager"),
    "torch.compile float32": partial(_torch, "float32", "default"),
    "ONNX Runtime float32": partial(_onnx, "model.onnx"),
    "ONNX Runtime int8": partial(_onnx, "model.int8.onnx"),
    "torch.compile bfloat16": partial(_torch, "bfloat16", "reduce-overhead"),  # with CUDA graphs of its own
    "torch.compile max-autotune bfloat16": partial(_torch, "bfloat16", "max-autotune"),
    "CUDA-graphed eager bfloat16": partial(_torch, "bfloat16", "graph"),
}
OURS = ("predict", "session")
NOT_ON_CPU = (
    "torch.compile bfloat16",
    "torch.compile max-autotune bfloat16",
    "CUDA-graphed eager bfloat16",
)
ON_CPU = tuple(name for name in CONTENDERS if name not in NOT_ON_CPU)
ON_GPU = (  # in the order in which ours compile: what all others are measured against stands first
    "predict auto",
    "predict bfloat16",
    "CUDA-graphed eager bfloat16",
    "PyTorch eager bfloat16",
    "session append + predict bfloat16",
    "predict float32",
    "session predict bfloat16",
    "torch.compile bfloat16",
    "PyTorch eager float32",
)
TINY = ("predict auto", "session append + predict bfloat16", "PyTorch eager float32")

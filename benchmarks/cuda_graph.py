"""A PyTorch model whose every kernel is recorded once and replayed with one launch (a CUDA graph).

The peer to beat at small batches, so it gets all that PyTorch offers: inputs are rounded on the host into one
pinned buffer, which travels in one asynchronous copy; the cast of the answer is part of the graph; the answer
comes back through pinned memory; the host waits once. All of it is ordered by one stream.
"""

import time
from collections.abc import Callable
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Shape = tuple[int, ...]


class Graph(Protocol):
    """What was recorded."""

    def replay(self) -> None:
        """Run it again on the same memory."""


Capture = Callable[[Callable[[], Tensor]], tuple[Graph, Tensor]]


class Replayed:
    """One recorded batch size: `replayed(*arrays)` gives the model's answer, float32.

    Everything happens in inference mode, updates of the buffers included: a tensor made there may not be
    changed outside.

    Args:
        model: Takes one tensor for each shape.
        shapes: Shapes of its inputs.
        dtype: What the inputs are rounded to.
        device: Where the model is.
        capture: Records a function: gives the recording, and the tensor in which each replay leaves its
            answer.
    """

    def __init__(
        self,
        model: Any,
        shapes: tuple[Shape, ...],
        dtype: torch.dtype,
        device: torch.device,
        capture: Capture,
    ):
        self._cuda = device.type == "cuda"
        with torch.inference_mode():
            total = sum(prod(shape) for shape in shapes)
            self._staged = torch.zeros(total, dtype=dtype, pin_memory=self._cuda)
            self._resident = torch.zeros(total, dtype=dtype, device=device)
            self._slots = _parts(self._staged, shapes)
            inputs = _parts(self._resident, shapes)
            self._graph, self._answer = capture(lambda: model(*inputs).float())
            self._returned = torch.empty(self._answer.shape, pin_memory=self._cuda)

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        """Answer one batch."""
        with torch.inference_mode():
            for slot, array in zip(self._slots, arrays, strict=True):
                slot.copy_(torch.from_numpy(array))
            self._resident.copy_(self._staged, non_blocking=True)
            self._graph.replay()
            self._returned.copy_(self._answer, non_blocking=True)
            self._wait()
            answer: np.ndarray = self._returned.numpy().copy()  # the buffer belongs to the next call
            return answer

    def seconds_on_device(self, runs: int) -> float:
        """Seconds of one replay, over `runs` in a row, without copies."""
        with torch.inference_mode():
            self._graph.replay()
            self._wait()
            started = time.perf_counter()
            for _ in range(runs):
                self._graph.replay()
            self._wait()
            return (time.perf_counter() - started) / runs

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.current_stream().synchronize()


def _parts(flat: Tensor, shapes: tuple[Shape, ...]) -> list[Tensor]:
    """Views of one buffer, one for each shape, each contiguous."""
    sizes = [prod(shape) for shape in shapes]
    return [part.view(shape) for part, shape in zip(torch.split(flat, sizes), shapes, strict=True)]


def capture(run: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
    """Record a function as a CUDA graph, after three runs on a stream of their own (as PyTorch asks for)."""
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = run()
    return graph, answer

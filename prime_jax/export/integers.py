"""Products of 8-bit integers in place of a graph's affine maps, with scales of each row's own.

Every row of activations is quantised by its own largest number, so a row's answer depends on no other row of
its batch. Activations take 8 bits around 128, weights 7 bits with a scale per output: no sum of two products
leaves 16 bits, where processors without VNNI would cut it off. Long tables, of word embeddings, keep their
rows as 8 bits and a scale each; they are looked up, not multiplied.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from prime_jax.export.optional import need

STEPS, MIDDLE = 127, 128  # activations become 128 - 127 to 128 + 127
WEIGHT_STEPS = 63  # 2 * 255 * 63 < 2 ** 15
TABLE_STEPS = 127
LONG = 1024  # rows of a table that is worth it
TINY = np.float32(1e-30)  # the scale of a row of zeros


def to_integers(model: Any) -> None:
    """Replace every product with a constant matrix, and every long table, in an `onnx_ir.Model`, in place.

    Only standard operators are written: QuantizeLinear with a scale per row, MatMulInteger.
    """
    passes, opset = need("onnx_ir.passes.common", "onnx"), model.opset_imports[""]
    quantised: dict[Any, tuple[Any, Any]] = {}
    for node in list(model.graph):
        constant = node.op_type == "MatMul" and node.inputs[1].const_value is not None
        if constant and len(node.inputs[1].shape) == 2:
            _replace(node, quantised, opset)
        elif node.op_type == "Gather" and _is_long_table(node):
            _replace_table(node, opset)
    passes.RemoveUnusedNodesPass()(model)


def _replace(node: Any, quantised: dict[Any, tuple[Any, Any]], opset: int) -> None:
    ir = need("onnx_ir", "onnx")
    rows, matrix = node.inputs
    weights, scales = _quantised_weights(matrix.const_value.numpy())
    made = _Nodes(node, opset)
    if rows not in quantised:  # queries, keys and values read the same rows
        quantised[rows] = made.quantised_rows(rows, weights.shape[0])
    integers, row_scales = quantised[rows]
    middle = made.constant(np.array(MIDDLE, np.uint8), "int8_middle")
    inputs = [integers, made.constant(weights, f"{matrix.name}_int8"), middle]
    product = made.add("Cast", [made.add("MatMulInteger", inputs)], to=ir.DataType.FLOAT)
    product = made.add("Mul", [product, made.constant(scales, f"{matrix.name}_scales")])
    product = made.add("Mul", [product, row_scales])
    middle_sizes = list(rows.shape)[1:-1]
    if all(isinstance(size, int) for size in middle_sizes) and middle_sizes:
        product = made.reshaped(product, [-1, *middle_sizes, weights.shape[1]])
    elif middle_sizes:  # texts of any length
        width = made.constant(np.array([weights.shape[1]], np.int64), f"shape_{weights.shape[1]}")
        sizes = made.add("Concat", [made.add("Shape", [rows], end=-1), width], axis=0)
        product = made.add("Reshape", [product, sizes])
    old = node.outputs[0]
    product.name, product.type, product.shape = old.name, old.type, old.shape
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], made.nodes, node.outputs, [product])


def _is_long_table(node: Any) -> bool:
    table, axis = node.inputs[0].const_value, node.attributes.get("axis")
    along_rows = axis is None or axis.as_int() == 0
    return along_rows and table is not None and len(table.shape) == 2 and table.shape[0] >= LONG


def _replace_table(node: Any, opset: int) -> None:
    ir = need("onnx_ir", "onnx")
    table, rows = node.inputs
    values = table.const_value.numpy()
    if values.dtype != np.float32:
        return
    scales = np.maximum(np.abs(values).max(axis=1, keepdims=True) / TABLE_STEPS, TINY).astype(np.float32)
    made = _Nodes(node, opset)
    kept = made.constant(np.rint(values / scales).astype(np.int8), f"{table.name}_int8")
    found = made.add("Cast", [made.add("Gather", [kept, rows], axis=0)], to=ir.DataType.FLOAT)
    scale = made.add("Gather", [made.constant(scales, f"{table.name}_scales"), rows], axis=0)
    product = made.add("Mul", [found, scale])
    old = node.outputs[0]
    product.name, product.type, product.shape = old.name, old.type, old.shape
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], made.nodes, node.outputs, [product])


def _quantised_weights(
    matrix: np.ndarray[Any, np.dtype[Any]],
) -> tuple[np.ndarray[Any, np.dtype[Any]], np.ndarray[Any, np.dtype[Any]]]:
    """A matrix `[I, O]` as int8, and the scale of each output, `[O]`."""
    scales = np.maximum(np.abs(matrix).max(axis=0) / WEIGHT_STEPS, TINY).astype(np.float32)
    return np.rint(matrix / scales).astype(np.int8), scales


class _Nodes:
    """The nodes that take the place of one node, in order."""

    def __init__(self, replaced: Any, opset: int):
        self._ir, self._replaced, self._opset = need("onnx_ir", "onnx"), replaced, opset
        self.nodes: list[Any] = []

    def add(self, kind: str, inputs: Sequence[Any], **attributes: Any) -> Any:
        """Add a node and return its output."""
        node = self._ir.node(kind, inputs, attributes=attributes)
        node.outputs[0].name = f"{self._replaced.outputs[0].name}_{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def quantised_rows(self, rows: Any, size: int) -> tuple[Any, Any]:
        """Rows `[..., size]` as uint8 `[R, size]`, and scales `[R, 1]`, NaN for a row with NaN or Inf."""
        flat = rows if len(rows.shape) == 2 else self.reshaped(rows, [-1, size])
        sizes = self.add("Abs", [flat])
        axis = self.constant(np.array([1], np.int64), "int8_axis")
        if self._opset < 18:  # axes became an input then
            largest = self.add("ReduceMax", [sizes], axes=[1], keepdims=0)
        else:
            largest = self.add("ReduceMax", [sizes, axis], keepdims=0)
        largest = self.reshaped(largest, [-1])  # ONNX Runtime does not reduce an empty batch's shape
        step = self.constant(np.array(1 / STEPS, np.float32), "int8_step")
        tiny = self.constant(np.array(TINY, np.float32), "int8_tiny")
        scales = self.add("Max", [self.add("Mul", [largest, step]), tiny])
        value = self._ir.tensor(np.array([MIDDLE], np.uint8))
        middles = self.add("ConstantOfShape", [self.add("Shape", [scales])], value=value)
        integers = self.add("QuantizeLinear", [flat, scales, middles], axis=0)
        # ONNX Runtime's maximum loses NaN, and an integer has none; a sum takes it on to the product.
        zero = self.constant(np.array(0, np.float32), "int8_zero")
        sums = self.reshaped(self.add("ReduceSum", [sizes, axis], keepdims=0), [-1])
        row_scales = self.add("Add", [scales, self.add("Mul", [sums, zero])])
        return integers, self.reshaped(row_scales, [-1, 1])

    def reshaped(self, value: Any, sizes: Sequence[int]) -> Any:
        """The value in another shape."""
        words = "_".join(map(str, sizes))
        return self.add("Reshape", [value, self.constant(np.array(sizes, np.int64), f"shape_{words}")])

    def constant(self, array: np.ndarray[Any, np.dtype[Any]], name: str) -> Any:
        """A constant of the graph, the same for all who ask by this name."""
        graph = self._replaced.graph
        if name not in graph.initializers:
            value = self._ir.Value(name=name, const_value=self._ir.tensor(array))
            value.shape = self._ir.Shape(array.shape)
            value.type = self._ir.TensorType(value.const_value.dtype)
            graph.register_initializer(value)
        return graph.initializers[name]

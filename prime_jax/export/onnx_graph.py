"""Tidies the graph that jax2onnx writes: no arithmetic on constants or on known shapes, nothing twice.

Unknown when the graph is written are the batch and, of texts, their length. Where one number of a shape
depends on them, it becomes -1; where several do, the graph computes them.
"""

from typing import Any

import numpy as np

from prime_jax.export.einsums import replace_einsums
from prime_jax.export.optional import need

_CLEANING = ("IdentityElimination", "CommonSubexpressionElimination", "RemoveUnusedNodes")


def tidy(model: Any) -> None:
    """Simplify an `onnx_ir.Model`, as jax2onnx returns it, in place and without changing what it computes."""
    passes = need("onnx_ir.passes.common", "onnx")
    replace_einsums(model)
    passes.RemoveUnusedNodesPass()(model)  # before they are folded
    for node in list(model.graph):  # in order, so that what depends on folded values is folded as well
        if node.inputs and all(value is not None and value.const_value is not None for value in node.inputs):
            _fold(node, model.opset_imports[""])
    for node in list(model.graph):
        if node.op_type == "Reshape":
            _reshape_by_a_constant(node)
        elif node.op_type == "Expand" and _shape(node.inputs[0]) == _shape(node.outputs[0]) is not None:
            _bypass(node, node.inputs[0])
        elif node.op_type == "Shape":
            _ask_the_input(node, model.graph.inputs)
    for name in _CLEANING:
        getattr(passes, f"{name}Pass")()(model)
    for node in model.graph:
        for value in node.outputs:
            if value.type is None:  # a shape without a type cannot be written down
                value.shape = None


def _fold(node: Any, opset: int) -> None:
    """Replace a node of constants by what it computes."""
    ir, reference = need("onnx_ir", "onnx"), need("onnx.reference", "onnx")
    graph = node.graph
    evaluator = reference.ReferenceEvaluator(ir.to_proto(node), opsets={"": opset})
    values = evaluator.run(None, {value.name: value.const_value.numpy() for value in node.inputs})
    constants = [
        ir.Value(name=old.name, type=old.type, shape=old.shape, const_value=ir.tensor(value.copy(order="C")))
        for old, value in zip(node.outputs, values, strict=True)
    ]
    ir.convenience.replace_all_uses_with(node.outputs, constants)
    graph.remove(node, safe=True)
    for constant in constants:
        graph.register_initializer(constant)


def _reshape_by_a_constant(node: Any) -> None:
    """Let the one unknown number of a shape be -1, instead of asking another array for it.

    A reshape that undoes the one before it is left out.
    """
    ir = need("onnx_ir", "onnx")
    source, shape = node.inputs[0], _shape(node.outputs[0])
    before = source.producer()
    if shape is not None and before is not None and before.op_type == "Reshape":
        origin = before.inputs[0]
        if _shape(origin) == shape:
            _bypass(node, origin)
            return
        source = origin
    if shape is None or sum(isinstance(size, str) for size in shape) > 1:
        return
    sizes = np.array([-1 if isinstance(size, str) else size for size in shape], np.int64)
    name = f"shape_{'_'.join(map(str, sizes))}"
    if name not in node.graph.initializers:
        constant = ir.Value(name=name, const_value=ir.tensor(sizes))
        constant.shape, constant.type = ir.Shape(sizes.shape), ir.TensorType(ir.DataType.INT64)
        node.graph.register_initializer(constant)
    node.replace_input_with(0, source)
    node.replace_input_with(1, node.graph.initializers[name])


def _ask_the_input(node: Any, inputs: Any) -> None:
    """Take the batch from an input of the graph, where only the first number of a shape is read."""
    shape, query = _shape(node.inputs[0]), inputs[-1]
    readers = [use.node for use in node.outputs[0].uses()]
    if shape and shape[0] == _shape(query)[0] and all(_reads_the_first(reader) for reader in readers):
        node.replace_input_with(0, query)
        node.outputs[0].shape = need("onnx_ir", "onnx").Shape([len(query.shape)])


def _reads_the_first(node: Any) -> bool:
    if node.op_type != "Gather" or node.inputs[1].const_value is None:
        return False
    return bool((node.inputs[1].const_value.numpy() == 0).all())


def _bypass(node: Any, source: Any) -> None:
    """Let whoever reads a node's answer read `source`, which is the same."""
    ir, output = need("onnx_ir", "onnx"), node.outputs[0]
    if not output.is_graph_output():
        ir.convenience.replace_all_uses_with(output, source)


def _shape(value: Any) -> Any:
    """A tuple of sizes, the name where a size is unknown; None where nothing is known."""
    if value.shape is None:
        return None
    sizes = tuple(size if isinstance(size, int) else size.value for size in value.shape)
    return None if None in sizes else sizes
